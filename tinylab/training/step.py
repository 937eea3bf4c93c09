"""One optimizer step: gradients of the mean loss over the global batch, clipped, applied at the scheduled rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinylab.checkpoint.state import TrainState
from tinylab.data.loader import MicroBatch, StepBatch
from tinylab.dist.context import Context
from tinylab.errors import TinylabError
from tinylab.model.loss import IGNORED
from tinylab.model.precision import Precision
from tinylab.training.gradients import sum_gradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Nats per token, mean over every target of the global batch."""
    grad_norm: float
    """Global norm before clipping."""


def agree(context: Context, batch: StepBatch, wants_stop: bool) -> tuple[int, int, bool]:
    """What all ranks bring to a step: hash of all samples, targets that count, and whether any rank wants to stop.

    Targets masked at a document's boundary do not count. One exchange on the CPU; the halves of the hash are summed
    apart, for sums of 64-bit hashes leave the range of int64.
    """
    targets = sum(int((b.targets != IGNORED).sum()) for b in batch.micro_batches)
    high, low, targets, stops = context.sum_integers(
        [batch.data_hash >> 32, batch.data_hash & 0xFFFFFFFF, targets, int(wants_stop)]
    )
    return ((high << 32) + low) % 2**64, targets, stops > 0


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    targets: int,
    *,
    lr: float,
    clip_norm: float | None,
    precision: Precision,
    context: Context,
) -> StepResult:
    """Do the step after `state.step` with this rank's micro-batches; `targets` counts those of all ranks.

    Loss and gradients are sums in nats over all micro-batches and ranks, divided once by `targets`: so neither the
    size of a micro-batch, nor the number of ranks, nor masked targets shift the mean. The host waits for the device
    once. Raises TinylabError naming the step when loss or norm is not finite; weights and moments are then untouched.
    """
    nats, norm = sum_gradients(state, micro_batches, targets, precision, context)
    loss_mean, grad_norm = torch.stack([nats / targets, norm.double()]).tolist()
    if not (math.isfinite(loss_mean) and math.isfinite(grad_norm)):
        raise TinylabError(
            f"loss and gradient norm must be finite; found loss {loss_mean} and norm {grad_norm} in step "
            f"{state.step + 1}. The update was not made; weights are those of step {state.step}. Look at the step's "
            "samples (tinylab batch), lower optimizer.lr or set optimizer.clip_norm in a new run"
        )
    if clip_norm is not None and grad_norm > clip_norm:
        torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["rate_scale"]
    state.optimizer.step()
    state.step += 1
    return StepResult(loss=loss_mean, grad_norm=grad_norm)
