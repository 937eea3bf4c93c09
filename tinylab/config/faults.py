"""What a run does about a step that must not be learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinylab.config.architecture import require_positive
from tinylab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What follows a step at fault: its loss or gradient norm is not finite, or a spike.

    A step that is refused changes neither weights nor moments. It keeps its number, its samples and its place in the
    schedule. All of this may change between two starts of a run.
    """

    nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """After NaN or infinity on any rank: end the run, refuse the step, or return to the last checkpoint and leave the
    step out on the way back, which also helps when the weights in memory were damaged."""
    max_in_row: int = 3
    """Steps in a row that may be refused; one more ends the run."""
    rewind_skips: int = 1
    """Steps left out after a rewind: the one at fault and those that follow it."""
    spikes: Literal["off", "warn", "skip", "rewind"] = "off"
    """After a spike: write it into the journal, or also refuse the step, or rewind as above."""
    spike_sigmas: float = 6.0
    """A spike is a loss or gradient norm above mean + spike_sigmas · standard deviation of the steps before it."""
    spike_window: int = 128
    """Steps before it, those that were not refused; until there are as many, no step is a spike."""

    def __post_init__(self) -> None:
        require_positive("faults", self, "max_in_row rewind_skips spike_sigmas spike_window")
        if self.rewind_skips > self.max_in_row:
            raise ConfigError(
                f"faults.rewind_skips ({self.rewind_skips}) must be at most faults.max_in_row ({self.max_in_row}), "
                "or a rewind would end the run; lower the one or raise the other"
            )
