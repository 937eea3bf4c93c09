"""A training state copied out of the step: every rank copies the rows that it will write, and nothing else.

Of rows that several ranks have (replicated weights, say) one of them writes the copy, by turns, so that each writes
about as much. Nothing is sent between ranks but the states of their random generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.dist.context import Context
from tinylab.model.names import name_map


@dataclass(kw_only=True)
class Snapshot:
    """What one rank writes of a checkpoint, on the CPU: all of it, or some tensors and rows of others."""

    weights: Mapping[str, Tensor]
    """The model's own parameter names, fp32."""
    optimizer: Mapping[str, Tensor]
    """`<parameter>.<state>`, e.g. `embed.weight.exp_avg`."""
    rng: Mapping[str, Tensor]
    """uint8 states: `cpu.0`, `cuda.0`, … by rank."""
    record: dict[str, Any] = field(default_factory=dict)
    """Plain values of `trainer.json`; `step` and `tokens` at least."""
    first_rows: Mapping[str, int] = field(default_factory=dict)
    """Of the tensors that are here in part: the first row."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every tensor of the optimizer, where several ranks write them."""
    total_bytes: int = 0
    """Of the tensors that all ranks write together."""
    blocked_s: float = 0.0
    """How long the steps waited for it and for the save before it."""


class Piece(NamedTuple):
    """Rows of one tensor of a checkpoint's files."""

    values: Tensor
    shape: tuple[int, ...]
    """Of the tensor that they are rows of."""
    start: int
    """The first of them."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the rows begin in the tensor, by dimension."""
        return (self.start, *(0 for _ in self.shape[1:])) if self.shape else ()


def weight_pieces(snapshot: Snapshot, model: Model) -> dict[str, Piece]:
    """The rows of the snapshot's weights by Hugging Face's names: those of a fused matrix are cut at its parts."""
    parts_of, result = name_map(model), {}
    for name, values in snapshot.weights.items():
        start = snapshot.first_rows.get(name, 0)
        for part in parts_of[name]:
            first, end = max(start, part.start), min(start + len(values), part.rows.stop)
            if first < end:
                result[part.name] = Piece(values[first - start : end - start], part.shape, first - part.start)
    return result


def optimizer_pieces(snapshot: Snapshot) -> dict[str, Piece]:
    """The rows of the snapshot's optimizer tensors."""
    return {
        name: Piece(values, snapshot.shapes.get(name, tuple(values.shape)), snapshot.first_rows.get(name, 0))
        for name, values in snapshot.optimizer.items()
    }


class SnapshotMemory:
    """CPU memory for a snapshot, used again for the next; page-locked for a CUDA device, which copies into it fast."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, values: Tensor) -> Tensor:
        """A copy of `values`; from a CUDA device it is complete only after a synchronization."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
            buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(values, non_blocking=True)


def take_snapshot(
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    context: Context,
    record: dict[str, Any],
    memory: SnapshotMemory,
) -> Snapshot:
    """A copy of what this rank writes of the state. Every rank must call it, with its part of the same tensors."""
    loads: dict[int, list[int]] = {}
    first_rows: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0

    def own(tensors: Mapping[str, Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
        nonlocal total
        for name, tensor in tensors.items():
            held, size = _held(tensor.detach(), context), tensor.numel() * tensor.element_size()
            total += size
            if kind == "optimizer":
                shapes[name] = tuple(tensor.shape)
            load = loads.setdefault(held.copies, [0] * held.copies)
            writer = load.index(min(load))
            load[writer] += size
            if held.copy != writer or (held.values.numel() == 0 and tensor.numel() > 0):
                continue
            if held.values.shape != tensor.shape:
                first_rows[name] = held.start
            yield name, memory.copy(f"{kind} {name}", held.values)

    snapshot = Snapshot(
        weights=dict(own(weights, "weight")),
        optimizer=dict(own(optimizer, "optimizer")),
        rng=rng_states(context),
        record=record,
        first_rows=first_rows,
        shapes=shapes,
        total_bytes=total,
    )
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    return snapshot


class _Held(NamedTuple):
    """The rows of a tensor that this rank has."""

    values: Tensor
    start: int
    copy: int
    """Its number among the ranks that have the same rows."""
    copies: int


def _held(tensor: Tensor, context: Context) -> _Held:
    """What this rank has of a tensor; one that is not distributed is the same on every rank."""
    if not hasattr(tensor, "device_mesh"):
        return _Held(tensor, 0, context.rank, context.world)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    assert all(p.is_replicate() or p.is_shard(0) for p in placements), f"rows must be sharded; found {placements}"
    copy, copies = 0, 1
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            copy, copies = copy * mesh.size(axis) + mesh.get_local_rank(axis), copies * mesh.size(axis)
    return _Held(tensor.to_local(), own_start(tensor), copy, copies)  # type: ignore[attr-defined]


def own_start(tensor: Tensor) -> int:
    """The first row of a distributed tensor that this rank has."""
    chunks = tensor.__create_chunk_list__()  # type: ignore[attr-defined]  # how torch.distributed.checkpoint asks it
    return chunks[0].offsets[0] if chunks and len(chunks[0].offsets) else 0


def rng_states(context: Context) -> dict[str, Tensor]:
    """States of the random generators of every rank, on every rank."""
    own = {"cpu": torch.get_rng_state()}
    if context.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(context.device)
    return {f"{kind}.{rank}": t for kind, s in own.items() for rank, t in enumerate(context.gather_tensor(s))}
