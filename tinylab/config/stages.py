"""How a run goes over its tokens: its stages, and its learning rate.

Counts are in tokens, summed over all ranks.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from tinylab.config.architecture import require_positive
from tinylab.errors import ConfigError

STEP_TOKENS = 2_097_152
"""Tokens of a TinyLlama v1.0 step: 1,024 sequences of 2,048."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run with one mixture, one learning-rate segment and one batch size."""

    name: str = "pretrain"
    """Name in metrics, journal and figures."""
    tokens: int = 3_000_000_000_000
    """Length in tokens over all ranks; rounded up to whole steps."""
    batch_tokens: int = STEP_TOKENS
    """Tokens per optimizer step, summed over all ranks and micro-batches.

    TinyLlama: 1,024 sequences of 2,048 (jzhang38/TinyLlama:README.md)."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of each source in this stage's samples, any positive scale; empty: equal shares."""
    ramp_tokens: int = 0
    """The mixture moves linearly from the previous stage's over this many tokens, then stays."""
    lr: Literal["schedule", "constant", "linear", "cosine"] = "schedule"
    """`schedule` follows the run's schedule; the others are a segment of this stage's own."""
    lr_end: float | None = None
    """End of a linear or cosine segment as a fraction of optimizer.lr; absent: the schedule's end."""

    def __post_init__(self) -> None:
        require_positive(f"stages.{self.name}", self, "tokens batch_tokens")
        if self.ramp_tokens < 0 or self.ramp_tokens > self.tokens:
            raise ConfigError(
                f"stages.{self.name}.ramp_tokens must lie between 0 and the stage's tokens ({self.tokens}); "
                f"found {self.ramp_tokens}"
            )
        bad = {k: v for k, v in self.mixture.items() if not (math.isfinite(v) and v >= 0)}
        if bad or (self.mixture and not sum(self.mixture.values()) > 0):
            raise ConfigError(
                f"stages.{self.name}.mixture must hold finite shares of at least 0 with a positive sum; "
                f"found {bad or self.mixture}"
            )
        if self.lr_end is not None and not 0 <= self.lr_end <= 1:
            raise ConfigError(
                f"stages.{self.name}.lr_end must lie between 0 and 1 (a fraction of optimizer.lr); found {self.lr_end}"
            )
        if self.lr_end is not None and self.lr not in ("linear", "cosine"):
            raise ConfigError(
                f'stages.{self.name}.lr_end needs stages.{self.name}.lr = "linear" or "cosine"; found lr = "{self.lr}"'
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage: tokens / batch_tokens, rounded up."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The run's learning rate over its tokens, as fractions of optimizer.lr."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` is constant, then linear over the last `decay_fraction`."""
    warmup_tokens: int = 2000 * STEP_TOKENS
    """Linear rise from 0 over the first tokens of the run. TinyLlama: 2,000 steps."""
    end: float = 0.1
    """Rate at the end as a fraction of the peak. TinyLlama: 4e-5 of 4e-4."""
    decay_fraction: float = 0.2
    """wsd only: share of the run's tokens that decay."""

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0:
            raise ConfigError(f"schedule.warmup_tokens must be at least 0; found {self.warmup_tokens}")
        if self.kind != "constant" and not 0 <= self.end < 1:
            raise ConfigError(
                f"schedule.end must lie below 1 (and at 0 or above), or the rate does not decay; found {self.end}. "
                'Set schedule.kind = "constant" for a rate that stays'
            )
        if self.end < 0:
            raise ConfigError(f"schedule.end must be at least 0: a stage's own decay ends there; found {self.end}")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"schedule.decay_fraction must lie above 0 and at most 1; found {self.decay_fraction}")
