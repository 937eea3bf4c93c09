"""What a step costs: time, waiting for data, tokens per second, share of the device's peak, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tinylab.checkpoint.state import TrainState
from tinylab.config.schema import RunConfig
from tinylab.data.loader import StepBatch
from tinylab.data.order import format_hash
from tinylab.dist.context import Context
from tinylab.model.accounting import flops_per_token
from tinylab.model.devices import bf16_peak_flops
from tinylab.training.step import StepResult


class Meter:
    """Measures each step from the wait for its data to its update, without validation and checkpoints."""

    def __init__(self, config: RunConfig, context: Context) -> None:
        self._config, self._context = config, context
        self._flops_per_token = flops_per_token(config.model)
        self._peak = device_peak(context.device)
        self._began = self._waited = 0.0

    def timed(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """The batches, the wait for each noted."""
        iterator = iter(batches)
        while True:
            self._began = time.perf_counter()
            batch = next(iterator, None)
            self._waited = time.perf_counter() - self._began
            if batch is None:
                return
            yield batch

    def record(self, state: TrainState, result: StepResult, lr: float, data_hash: int) -> dict[str, Any]:
        """The step's line of `metrics.jsonl`, and its time added to the state's device hours."""
        config, step, world = self._config, state.step, self._context.world
        seconds = time.perf_counter() - self._began
        state.hours += seconds * world / 3600
        stage = config.stages[config.stage_index(step)]
        tokens_per_s = stage.batch_tokens / seconds
        return {
            "step": step,
            "tokens": config.tokens_at(step),
            "loss": finite_or_none(result.loss),
            "lr": lr,
            "grad_norm": finite_or_none(result.grad_norm),
            "stage": stage.name,
            "refused": result.refused,
            "step_time_s": round(seconds, 6),
            "data_wait_s": round(self._waited, 6),
            "data_hash": format_hash(data_hash),
            "tokens_per_s": round(tokens_per_s, 3),
            "mfu": self._flops_per_token * tokens_per_s / (world * self._peak) if self._peak else None,
            "peak_memory_gib": round(peak_memory(self._context.device) / 2**30, 4),
        }


def finite_or_none(value: float) -> float | None:
    """`value` for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None where it is unknown, as on every CPU."""
    return bf16_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: of the device by tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
