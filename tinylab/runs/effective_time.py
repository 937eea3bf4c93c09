"""What the time of a run went into, from its journal and metrics alone: its effective training time ratio (ETTR).

| part | seconds of |
|---|---|
| steps | computing the steps that the run kept, without their wait for data |
| data_wait | waiting for the data of those steps |
| validation | measuring on held-out text |
| save | waiting for checkpoints: most of a save runs beside the steps |
| repeated | steps that were lost by a kill or a rewind, and done again |
| restart | opening the run at each start, until its first step |
| idle | no trainer, or one that had not opened the run yet |
| other | the rest of a trainer's time: hooks, logging, the wait for the last checkpoint, a step cut short |

The parts add up to the time from the first opening of the run to its last line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PARTS = ("steps", "data_wait", "validation", "save", "repeated", "restart", "idle", "other")
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class EffectiveTime:
    """Seconds of a run by part; `wall_s` is their sum."""

    parts: dict[str, float]

    @property
    def wall_s(self) -> float:
        """From the first opening of the run to its last line."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float | None:
        """The share of `steps` in the time of the run; None before the first step."""
        return self.parts["steps"] / self.wall_s if self.wall_s and self.parts["steps"] else None

    def shares(self) -> dict[str, float]:
        """Each part as a share of the time of the run; all 0 before it has begun."""
        return {name: seconds / (self.wall_s or 1.0) for name, seconds in self.parts.items()}


def effective_time(journal: Lines, metrics: Lines) -> EffectiveTime:
    """What the time of a run went into. Lines without a time, as those of earlier versions, count as 0 s.

    A killed trainer's end is the last that was seen of it when the run was opened again.
    """
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    starts = [i for i, line in enumerate(journal) if line.get("event") in ("started", "resumed")]
    end = None
    for start, behind in pairwise([*starts, len(journal)]):
        begun, following = journal[start], journal[behind] if behind < len(journal) else None
        opened = _seconds(begun, "time") - _seconds(begun, "restart_s")
        parts["restart"] += _seconds(begun, "restart_s")
        parts["idle"] += max(0.0, opened - end) if end is not None else 0.0
        known = _known(journal[start:behind], following, metrics)
        for name, seconds in known.items():
            parts[name] += seconds
        spent = sum(known.values())
        end = max(_seconds(line, "time") for line in journal[start:behind])
        if following is not None:
            end = max(end, _seconds(following, "last_seen"))
            end = min(end, _seconds(following, "time") - _seconds(following, "restart_s"))
        end = max(end, _seconds(begun, "time") + spent)
        parts["other"] += end - _seconds(begun, "time") - spent
    return EffectiveTime(parts=parts)


def _known(session: Lines, following: Mapping[str, Any] | None, metrics: Lines) -> dict[str, float]:
    """The measured parts of one trainer's time: `session` is its part of the journal, `following` the next start."""
    first = int(_seconds(session[0], "step"))
    last = float("inf") if following is None else int(_seconds(following, "step"))
    kept = [line for line in metrics if first < _seconds(line, "step") <= last]
    waited = sum(min(_seconds(line, "data_wait_s"), _seconds(line, "step_time_s")) for line in kept)
    return {
        "steps": sum(_seconds(line, "step_time_s") for line in kept) - waited,
        "data_wait": waited,
        "validation": sum(_seconds(line, "validation_s") for line in kept),
        "save": sum(_seconds(line, "blocked_s") for line in session),
        "repeated": _seconds(following or {}, "repeated_s"),
    }


def _seconds(line: Mapping[str, Any], key: str) -> float:
    """A number of a line; 0 where there is none, or a negative one."""
    value = line.get(key)
    return max(0.0, float(value)) if isinstance(value, int | float) and abs(value) < 1e15 else 0.0


class TrainerClock:
    """What a trainer notes while it has a run open, for the lines that `effective_time` reads."""

    def __init__(self) -> None:
        self.opened_at: float | None = None
        """When this trainer opened the run (Unix s); None after its first line."""
        self.last_seen: float | None = None
        """The last that was seen of the trainer before it (Unix s)."""

    def open(self, last_seen: float | None) -> None:
        """Note that the run is being opened, if no line of its start is due already."""
        if self.opened_at is None:
            self.opened_at, self.last_seen = time.time(), last_seen

    def started(self) -> dict[str, float]:
        """What belongs to the journal's line of a start: `restart_s` and `last_seen`."""
        now = time.time()
        opened, seen = self.opened_at or now, self.last_seen
        self.opened_at, self.last_seen = None, None
        return {"restart_s": round(now - opened, 3)} | ({"last_seen": min(seen, opened)} if seen else {})
