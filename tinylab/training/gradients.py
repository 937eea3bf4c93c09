"""The gradients of one step, left in the parameters' `.grad`: sums over all micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinylab.checkpoint.state import TrainState
from tinylab.dist.canonical import CanonicalGradients
from tinylab.dist.context import Context
from tinylab.dist.parallel import average_gradients, exchange_only_after_last, whole_tensor
from tinylab.model.loss import MicroBatch
from tinylab.model.precision import Precision


def sum_gradients(
    state: TrainState, micro_batches: Sequence[MicroBatch], targets: int, precision: Precision, context: Context
) -> tuple[Tensor, Tensor]:
    """(nats of the whole batch, norm of the gradients of the mean over its `targets`), both the same on every rank.

    Every rank must bring as many micro-batches. Nothing waits for the device.
    """
    for parameter in state.model.parameters():
        parameter.grad = None
    how = _canonical if state.parallel.reduction == "canonical" else _fast
    return how(state, micro_batches, targets, precision, context)


def _fast(
    state: TrainState, micro_batches: Sequence[MicroBatch], targets: int, precision: Precision, context: Context
) -> tuple[Tensor, Tensor]:
    """As floats, each rank its own share, then over the ranks."""
    # Replication and sharding average gradients over the ranks, so each rank's sum counts `world` times.
    scale = context.world / targets
    nats = torch.zeros((), dtype=torch.float64, device=context.device)
    for i, batch in enumerate(micro_batches, start=1):
        exchange_only_after_last(state.model, i == len(micro_batches))
        with precision.step():
            loss = state.loss(state.model, batch.to(context.device))
        (loss * scale).backward()
        nats += loss.detach()
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    average_gradients(gradients, state.parallel, context)
    return context.sum_tensor(nats), whole_tensor(torch.nn.utils.get_total_norm(gradients))


def _canonical(
    state: TrainState, micro_batches: Sequence[MicroBatch], targets: int, precision: Precision, context: Context
) -> tuple[Tensor, Tensor]:
    """With the same bits on any number of ranks (dist/canonical.py). Shares that it cannot add make the norm NaN."""
    sequences = [one for batch in micro_batches for one in batch.sequences()]
    gradients = CanonicalGradients(state.model, state.parallel, context, len(sequences))
    # One place per sequence of the batch: the sum over the ranks adds zeros to it, and its order is always the same.
    nats = torch.zeros(context.world, len(sequences), dtype=torch.float64, device=context.device)
    for i, sequence in enumerate(sequences):
        gradients.begin()
        with precision.step():
            loss = state.loss(state.model, sequence.to(context.device))
        (loss / targets).backward()
        gradients.add()
        nats[context.rank, i] = loss.detach()
    norm, unusable = gradients.finish()
    unusable = context.sum_tensor(unusable)
    return context.sum_tensor(nats).flatten().sum(), torch.where(unusable > 0, torch.nan, norm)
