"""The learning rate as a pure function of the configuration and the tokens before a step.

Tokens, not steps or micro-batches: the same curve at any accumulation, and a batch that grows in a later stage does
not stretch it. jzhang38/TinyLlama counts micro-batches instead: its step k (from 0) takes the rate of
k + 7/8 steps' tokens, so it runs at most one step ahead of ours, in the warm-up an eighth of a step behind.
"""

from __future__ import annotations

import math

from tinylab.config.schema import RunConfig
from tinylab.config.stages import Stage
from tinylab.errors import ConfigError


def lr_at(config: RunConfig, step: int) -> float:
    """Learning rate of step `step` (from 1).

    With t tokens before the step and a batch of b: min(1, (t + b) / warmup) while t < warmup, times the curve at t,
    times optimizer.lr. Raises ConfigError outside the run.
    """
    index = config.stage_index(step)
    tokens, warmup = config.tokens_at(step - 1), config.schedule.warmup_tokens
    warm = min(1.0, (tokens + config.stages[index].batch_tokens) / warmup) if tokens < warmup else 1.0
    return config.optimizer.lr * warm * _curve(config, index, tokens)


def check_schedule(config: RunConfig) -> None:
    """Raise ConfigError naming every stage whose own decay does not end below where it starts."""
    problems = []
    for i, stage in enumerate(config.stages):
        start = _curve(config, i, _start(config, i))
        if stage.lr in ("linear", "cosine") and _end(config, stage) >= start:
            problems.append(
                f"stages.{stage.name}.lr_end must lie below its start ({start:.4g} of optimizer.lr) "
                f'or the rate does not decay; found {_end(config, stage):.4g}. Lower it, or set lr = "constant"'
            )
    if problems:
        raise ConfigError("; ".join(problems))


def _curve(config: RunConfig, index: int, tokens: int) -> float:
    """The rate at `tokens` in stage `index` as a fraction of the peak, without the warm-up."""
    stage = config.stages[index]
    if stage.lr == "schedule":
        return _schedule(config, tokens)
    first = _start(config, index)
    # A segment of the stage's own goes on from where the stage before left off.
    start = _curve(config, index - 1, first) if index else 1.0
    if stage.lr == "constant":
        return start
    progress = min(1.0, (tokens - first) / (stage.steps * stage.batch_tokens))
    return _decay(stage.lr, progress, start, _end(config, stage))


def _schedule(config: RunConfig, tokens: int) -> float:
    """The run's own schedule at `tokens`, as a fraction of the peak; 1 during the warm-up."""
    schedule, total = config.schedule, config.tokens
    if schedule.kind == "constant":
        return 1.0
    first = schedule.warmup_tokens
    if schedule.kind == "wsd":
        first = max(first, total * (1 - schedule.decay_fraction))
    progress = min(1.0, max(0.0, (tokens - first) / max(total - first, 1)))
    return _decay("cosine" if schedule.kind == "cosine" else "linear", progress, 1.0, schedule.end)


def _decay(shape: str, progress: float, start: float, end: float) -> float:
    """From `start` to `end` as progress goes from 0 to 1: half a cosine (Loshchilov and Hutter 2017) or a line."""
    left = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return end + (start - end) * left


def _start(config: RunConfig, index: int) -> int:
    """Tokens before the first step of stage `index`."""
    return sum(s.steps * s.batch_tokens for s in config.stages[:index])


def _end(config: RunConfig, stage: Stage) -> float:
    """Where the stage's own segment ends, as a fraction of the peak."""
    return config.schedule.end if stage.lr_end is None else stage.lr_end
