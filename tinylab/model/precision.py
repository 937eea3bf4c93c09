"""The number format of a step's matrix products: what it asks of the device, the model and the forward pass."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tinylab.errors import ConfigError


def native_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware.

    A CPU with AVX512_BF16 or AMX; a CUDA device of capability 8.0 (Ampere) or later. Others emulate it: slower than
    fp32, and no smaller error. Measured on two cores of an AMD EPYC with AVX512_BF16 and torch 2.13: products of the
    `tiny` preset ran at 2.3 times their fp32 rate, its whole training step at 1.6 times (`tinylab bench train`).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@dataclass(frozen=True)
class Precision:
    """fp32 on a device, and what other precisions change about it."""

    device: torch.device
    name: ClassVar[str] = "fp32"
    """What `parallel.precision` calls it."""
    dtype: ClassVar[torch.dtype] = torch.float32
    """Of the operands of matrix products, attention's included."""

    def refusal(self) -> str | None:
        """Why the device cannot compute in it, as `needs …; found …`; None if it can."""
        return None

    def prepare(self, model: nn.Module) -> None:
        """Change the modules of a new or loaded model in place, before it is sharded. fp32 and bf16 leave them."""

    def step(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        return nullcontext()


class BF16(Precision):
    """torch's autocast: matrix products in bf16; weights, gradients and sums stay fp32."""

    name = "bf16"
    dtype = torch.bfloat16

    def refusal(self) -> str | None:
        if self.device.type != "cuda" or native_bf16(self.device):
            return None
        found = torch.cuda.get_device_name(self.device) if torch.cuda.is_available() else "no CUDA device"
        return f"needs compute capability 8.0 or later; found {found}"

    def step(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.dtype)


PRECISIONS: dict[str, type[Precision]] = {p.name: p for p in (Precision, BF16)}
"""Every precision by its name."""


def resolve_precision(device: str | torch.device, wanted: str) -> Precision:
    """The precision to use on the device: `wanted`, or for `auto` bf16 exactly where it is native.

    Raises ConfigError for an unknown name, and for a precision that the device cannot compute in.
    """
    name = ("bf16" if native_bf16(device) else "fp32") if wanted == "auto" else wanted
    if name not in PRECISIONS:
        raise ConfigError(f"parallel.precision must be auto, fp32 or bf16; found {wanted!r}")
    precision = PRECISIONS[name](torch.device(device))
    refusal = precision.refusal()
    if refusal:
        raise ConfigError(f'parallel.precision = "{name}" {refusal}. Set parallel.precision = "fp32" or "auto"')
    return precision
