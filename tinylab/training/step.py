"""One optimizer step: gradients of the mean loss over the global batch, clipped, applied at the scheduled rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinylab.checkpoint.state import TrainState
from tinylab.data.loader import StepBatch
from tinylab.dist.context import Context
from tinylab.errors import TinylabError
from tinylab.model.loss import IGNORED, MicroBatch
from tinylab.model.precision import Precision
from tinylab.training.gradients import sum_gradients
from tinylab.training.stop import REASONS


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Nats per token, mean over every target of the global batch."""
    grad_norm: float
    """Global norm before clipping."""
    refused: str | None = None
    """Why the update was not made (training/faults.py), None where it was."""


def agree(context: Context, batch: StepBatch, stop: int) -> tuple[int, int, int]:
    """What all ranks bring to a step: hash of all samples, targets that count, and why to stop.

    `stop` is this rank's reason, numbered as in stop.REASONS, 0 for none; the highest of all ranks is returned.
    Targets masked at a document's boundary do not count. One exchange on the CPU; the halves of the hash are summed
    apart, for sums of 64-bit hashes leave the range of int64.
    """
    targets = sum(int((b.targets != IGNORED).sum()) for b in batch.micro_batches)
    reasons = [int(stop == number) for number in range(1, len(REASONS))]
    high, low, targets, *stops = context.sum_integers(
        [batch.data_hash >> 32, batch.data_hash & 0xFFFFFFFF, targets, *reasons]
    )
    agreed = max((number for number, ranks in enumerate(stops, start=1) if ranks), default=0)
    return ((high << 32) + low) % 2**64, targets, agreed


def require_finite(step: int, loss: float, grad_norm: float, where: str = "") -> None:
    """Raise TinylabError naming the step, and `where` it was found, unless loss and norm are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TinylabError(
            f"loss and gradient norm must be finite; found loss {loss} and norm {grad_norm} in step {step}{where}. "
            f"The update was not made; weights are those of step {step - 1}. Look at the step's samples (tinylab "
            "batch), repeat the command with --set faults.nonfinite=skip or rewind, or start a new run with a lower "
            "optimizer.lr or optimizer.clip_norm"
        )


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    targets: int,
    *,
    lr: float,
    clip_norm: float | None,
    precision: Precision,
    context: Context,
    judge: Callable[[int, float, float], str | None] = require_finite,
) -> StepResult:
    """Do the step after `state.step` with this rank's micro-batches; `targets` counts those of all ranks.

    Loss and gradients are sums in nats over all micro-batches and ranks, divided once by `targets`: so neither the
    size of a micro-batch, nor the number of ranks, nor masked targets shift the mean. The host waits for the device
    once. `judge` is given step, loss and norm; where it says why the update must not be made, or raises,
    the state stays as it is.
    """
    nats, norm = sum_gradients(state, micro_batches, targets, precision, context)
    loss_mean, grad_norm = torch.stack([nats / targets, norm.double()]).tolist()
    refused = judge(state.step + 1, loss_mean, grad_norm)
    if refused is not None:
        return StepResult(loss=loss_mean, grad_norm=grad_norm, refused=refused)
    if clip_norm is not None and grad_norm > clip_norm:
        torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), clip_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["rate_scale"]
    state.optimizer.step()
    state.step += 1
    return StepResult(loss=loss_mean, grad_norm=grad_norm)
