"""A checkpoint that is opened but not read: names, shapes, and functions that each read one tensor.

Every format opens as `Weights` under Hugging Face's names; formats/load.py makes the model from them, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.model.names import name_map

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
"""Buffers that follow from the configuration; old checkpoints store them."""
_SHOWN = 200


@dataclass(frozen=True)
class LazyTensor:
    """Shape, dtype and a function that reads the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Reads the tensor from the file, on the CPU; callers only read it."""
    storage: str | None = None
    """Equal for tensors that are the same bytes of the file; None where the format cannot share."""
    place: tuple[Path, int] | None = None
    """File and first byte of the values, where they are stored as in memory; None where they must be computed."""

    @classmethod
    def stored(cls, path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        """Values that are stored as in memory, from byte `start` of a file."""

        def load() -> Tensor:
            values = torch.empty(shape, dtype=dtype)
            read_values(path, start, values)
            return values

        return cls(shape, dtype, load, place=(path, start))


@dataclass(frozen=True)
class Weights:
    """The model's configuration and its tensors under Hugging Face's names, not read yet."""

    model: Model
    tensors: Mapping[str, LazyTensor]
    origin: str
    """The file or folder, for messages."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype stored; float32 if the tensors have several."""
        kinds = {t.dtype for t in self.tensors.values()}
        return kinds.pop() if len(kinds) == 1 else torch.float32

    def check(self) -> Weights:
        """These weights, exactly the tensors of their configuration: a tied head and rotary buffers are left out.

        Raises CheckpointError listing all missing, unexpected and misshaped tensors together, and for a tied head
        that is stored and differs from the embedding.
        """
        layers = {int(found[1]) for found in map(_LAYER.match, self.tensors) if found}
        if self.model.n_layer > 2 * len(layers) + 8:  # before the names of a billion layers are made
            raise CheckpointError(
                f"{self.origin} must hold the {self.model.n_layer} layers of its configuration; found {len(layers)}"
            )
        expected = {p.name: p.shape for parts in name_map(self.model).values() for p in parts}
        repeated = {"lm_head.weight"} if self.model.tie_embeddings else set()
        kept = {n: t for n, t in self.tensors.items() if n not in repeated and not _DERIVED.fullmatch(n)}
        check_shapes({n: t.shape for n, t in kept.items()}, expected, self.origin)
        bad = sorted(f"{n} ({t.dtype})" for n, t in kept.items() if not t.dtype.is_floating_point)
        if bad:
            raise CheckpointError(f"{self.origin} must hold floating-point tensors; found {', '.join(bad[:20])}")
        for name in repeated & self.tensors.keys():
            self._check_tie(self.tensors[name], kept["model.embed_tokens.weight"])
        return replace(self, tensors=kept)

    def _check_tie(self, head: LazyTensor, embed: LazyTensor) -> None:
        if head.storage is not None and head.storage == embed.storage:
            return
        same = (head.shape, head.dtype) == (embed.shape, embed.dtype)
        if not same or not torch.equal(*(t.load().contiguous().flatten().view(torch.uint8) for t in (head, embed))):
            raise CheckpointError(
                f"{self.origin}: the configuration ties the embeddings, so lm_head.weight must equal "
                "model.embed_tokens.weight; they differ. Untie them in the configuration, or remove lm_head.weight"
            )


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError listing every missing, unexpected and misshaped tensor of `found` together."""
    lines = [f"missing: {n} {list(expected[n])}" for n in expected if n not in found]
    lines += [f"unexpected: {n[:200]} {list(found[n])}" for n in found if n not in expected]
    lines += [
        f"misshaped: {n} must be {list(expected[n])}, found {list(found[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if lines:
        rest = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"{where} must hold exactly the tensors of its configuration; found {len(lines)} differences. "
            "Check that weights and configuration belong together:\n  " + "\n  ".join(lines[:_SHOWN] + rest)
        )


def read_values(path: Path, start: int, out: Tensor) -> None:
    """Fill `out` (on the CPU, contiguous) from byte `start`, without a copy in between; releases the interpreter lock.

    Raises CheckpointError when the file cannot be read or ends too early.
    """
    rest = out.detach().reshape(-1).view(torch.uint8).numpy().data
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy the file again") from error
    if rest:
        raise CheckpointError(f"{path} ends {len(rest)} bytes too early: it changed. Copy the file again")
