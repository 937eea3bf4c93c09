"""Steps at fault: what a run does when loss or gradient norm is not finite, or a spike (section `[faults]`).

A refused step changes neither weights nor moments. What later decisions depend on is remembered in the checkpoint
(`TrainState.faults`) and, for the steps that a rewind leaves out, in the journal: so a run that is killed and resumed
decides as one that was left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tinylab.checkpoint.state import TrainState
from tinylab.config.faults import Faults
from tinylab.data.order import format_hash
from tinylab.dist.context import Context
from tinylab.dist.parallel import reshard
from tinylab.errors import TinylabError
from tinylab.model.loss import MicroBatch
from tinylab.model.precision import Precision
from tinylab.training.job import Job
from tinylab.training.step import StepResult, require_finite

NONFINITE, SPIKE, LEFT_OUT = "nonfinite", "spike", "left out"
"""Why a step was refused, in metrics and journal. `left out`: by a rewind, before anything was computed."""
NOT_COMPUTED = StepResult(loss=math.nan, grad_norm=math.nan, refused=LEFT_OUT)


class Guard:
    """Judges each step before its update, the same on every rank, and writes those at fault into the journal."""

    def __init__(self, job: Job, state: TrainState) -> None:
        self._job, self._state, self._policy = job, state, job.config.faults
        self._found: str | None = None
        self._left_out = _steps_left_out(job)

    def leaves_out(self, step: int) -> bool:
        """Whether a rewind left out `step`."""
        return step in self._left_out

    def judge(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the update of `step` must not be made, or None. Every rank must call it with the same values."""
        policy, context = self._policy, self._job.context
        self._found = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._found = NONFINITE
        elif policy.spikes != "off":
            window = self._state.faults.get("window", [])
            spike = context.is_main and is_spike(policy, window, loss, grad_norm)
            self._found = SPIKE if context.sum_integers([int(spike)])[0] else None
        return None if self._found == SPIKE and policy.spikes == "warn" else self._found

    def settle(
        self, result: StepResult, data_hash: int, batches: Sequence[MicroBatch], targets: int, precision: Precision
    ) -> bool:
        """Count the step where it was refused, and remember it; whether the run must now rewind.

        A step at fault gets a line in the journal. Every rank must call it. Raises TinylabError when the run must end.
        """
        policy, state = self._policy, self._state
        found, self._found = self._found, None
        ranks = None
        if found == NONFINITE:
            ranks = ranks_at_fault(state, batches, targets, precision, self._job.context)
        if result.refused:
            state.step += 1
        remember(state, policy, result)
        if found is None:
            return False
        action = policy.nonfinite if found == NONFINITE else policy.spikes
        in_row = state.faults.get("in_row", 0)
        if in_row > policy.max_in_row:
            action = "stop"
        self._write_down(result, found, action, ranks, data_hash)
        if action == "stop":
            where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
            if in_row <= policy.max_in_row:
                require_finite(state.step, result.loss, result.grad_norm, where)
            raise TinylabError(
                f"at most {policy.max_in_row} steps in a row may be refused (faults.max_in_row); found {in_row} up to "
                f"step {state.step}, whose loss is {result.loss} and norm {result.grad_norm}{where}. Weights are those "
                f"of step {state.step - in_row}. Look at its samples (tinylab batch), or start a new run with a lower "
                "optimizer.lr"
            )
        return action == "rewind"

    def _write_down(self, result: StepResult, found: str, action: str, ranks: list[int] | None, data_hash: int) -> None:
        """Rank 0: the journal line of the step at fault, with the steps that a rewind now leaves out."""
        step, run = self._state.step, self._job.run
        line: dict[str, Any] = {
            "kind": found,
            "action": action,
            "step": step,
            "loss": _plain(result.loss),
            "grad_norm": _plain(result.grad_norm),
            "ranks": ranks,
            "data_hash": format_hash(data_hash),
            "look": f"tinylab batch {run.path} --step {step}",
        }
        if action == "rewind":
            line["left_out"] = list(range(step, min(step + self._policy.rewind_skips, self._job.config.steps + 1)))
        if self._job.context.is_main:
            run.write_journal("fault", **line)


def is_spike(policy: Faults, window: Sequence[Sequence[float]], loss: float, grad_norm: float) -> bool:
    """Whether one of the two lies above mean + `spike_sigmas` · standard deviation of the `window` (loss, norm)."""
    if len(window) < policy.spike_window:
        return False
    pairs = zip((loss, grad_norm), zip(*window, strict=True), strict=True)
    return any(value > _limit(before, policy.spike_sigmas) for value, before in pairs)


def _limit(values: Sequence[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    return mean + sigmas * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def remember(state: TrainState, policy: Faults, result: StepResult) -> None:
    """Put what later steps are judged by into `state.faults`, anew: a checkpoint being written may hold the old one.

    The window holds the (loss, norm) of the last steps that were not refused, so no value in it is not finite.
    """
    in_row = state.faults.get("in_row", 0) + 1 if result.refused else 0
    window = state.faults.get("window", [])
    if policy.spikes == "off":
        window = []
    elif not result.refused:
        window = [*window, [result.loss, result.grad_norm]][-policy.spike_window :]
    state.faults = ({"in_row": in_row} if in_row else {}) | ({"window": window} if window else {})


def ranks_at_fault(
    state: TrainState, batches: Sequence[MicroBatch], targets: int, precision: Precision, context: Context
) -> list[int] | None:
    """The ranks whose own share of the step is not finite, found by computing it once more on unchanged weights.

    None where that cannot be known: every loss is finite, and the gradients were added up by FSDP2.
    """
    whole = all(not hasattr(p, "device_mesh") for p in state.model.parameters())
    finite = torch.tensor([1, 1])
    for parameter in state.model.parameters():
        parameter.grad = None
    for batch in batches:
        with torch.set_grad_enabled(whole), precision.step():
            loss = state.loss(state.model, batch.to(context.device))
        finite[0] &= int(loss.isfinite())
        if whole:
            (loss * context.world / targets).backward()
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    if gradients:
        finite[1] = int(torch.nn.utils.get_total_norm(gradients).isfinite())
    for parameter in state.model.parameters():
        parameter.grad = None
    reshard(state.model)
    shares = torch.stack(context.gather_tensor(finite))
    losses, norms = ([rank for rank, ok in enumerate(column.tolist()) if not ok] for column in shares.unbind(1))
    return losses or norms or None


def _steps_left_out(job: Job) -> frozenset[int]:
    """Every step that rewinds of this run left out, by rank 0's journal, on every rank."""
    journal = job.run.journal() if job.context.is_main else []
    steps = sorted({s for line in journal if line["event"] == "fault" for s in line.get("left_out", [])})
    (count,) = job.context.sum_integers([len(steps)])
    return frozenset(job.context.sum_integers(steps or [0] * count))


def _plain(value: float) -> float | str:
    """A number for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else str(value)
