"""A tensor that is known but not read: what every checkpoint reader hands out, so that models stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylab.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """Shape, dtype and a function that reads the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Reads a fresh tensor from the file, on the CPU."""
    storage: str | None = None
    """Equal for tensors that share all their bytes; None where the format cannot share."""


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError listing every missing, unexpected and misshaped tensor of `found` together."""
    lines = [f"missing: {n} {list(expected[n])}" for n in expected if n not in found]
    lines += [f"unexpected: {n} {list(found[n])}" for n in found if n not in expected]
    lines += [
        f"misshaped: {n} must be {list(expected[n])}, found {list(found[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if lines:
        shown = lines[:200] + ([f"… and {len(lines) - 200} more"] if len(lines) > 200 else [])
        raise CheckpointError(
            f"{where} must hold exactly the tensors of its configuration; found {len(lines)} differences. "
            "Check that weights and configuration belong together:\n  " + "\n  ".join(shown)
        )
