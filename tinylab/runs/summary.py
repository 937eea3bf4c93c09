"""Many runs at a glance: state and progress of each, selected and sorted by columns and configuration keys."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tinylab.config.counts import parse_count
from tinylab.config.io import run_to_dict
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError, TinylabError, did_you_mean
from tinylab.runs.effective_time import effective_time
from tinylab.runs.folder import Run

COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
Row = dict[str, Any]


def run_summary(run: Run) -> Row:
    """State and progress of a run: step, tokens, losses (nats per token), ranks, checkpoints, heartbeat's age (s).

    `effective_time` is the share of its time spent in steps that it kept, `time_s` all of its time by cause (s).
    """
    config, status, records = run.config, run.status(), run.metric_records()
    spent = effective_time(run.journal(), records)
    last = records[-1] if records else {}
    measured = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
    heartbeat = status.get("heartbeat")
    return {
        "run": run.name,
        "path": str(run.path),
        "preset": config.preset,
        "state": status["state"],
        "step": last.get("step", 0),
        "steps": config.steps,
        "tokens": last.get("tokens", 0),
        "loss": last.get("loss"),
        "validation_loss": measured[-1] if measured else None,
        "world": status.get("world") or _journaled_world(run),
        "checkpoints": len(run.checkpoints()),
        "heartbeat_age_s": round(time.time() - heartbeat, 1) if heartbeat else None,
        "effective_time": spent.ratio and round(spent.ratio, 4),
        "time_s": {part: round(seconds, 3) for part, seconds in spent.parts.items()},
    }


def summarize(runs: Sequence[Run], keys: Sequence[str] = ()) -> list[Row]:
    """A summary of each run, with the values of these configuration keys. What cannot be read has the state
    `unreadable` and the reason as `error`, so that the others are still listed."""
    rows = []
    for run in runs:
        try:
            config = run.config
            rows.append({key: _value(config, key) for key in keys} | run_summary(run))
        except Exception as error:  # whatever is wrong with one run, the others are listed
            reason = str(error) if isinstance(error, TinylabError | OSError) else f"{type(error).__name__}: {error}"
            rows.append({"run": run.name, "path": str(run.path), "state": "unreadable", "error": reason})
    return rows


def condition(text: str) -> tuple[str, str, str]:
    """Key, comparison and value of `KEY=VALUE`, also with != < <= > >=. Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", text)
    if not found:
        raise ConfigError(f"a condition must look like KEY=VALUE, also with != < <= > >=; found {text!r}")
    return found[1], found[2], found[3]


def require_known(keys: Iterable[str], rows: Sequence[Row]) -> None:
    """Raise ConfigError for a key of which no row has a value."""
    known = {k for row in rows for k, value in row.items() if value is not None}
    for key in keys:
        if key not in known:
            hint = did_you_mean(key, known, f"columns: {', '.join(sorted(known))}")
            raise ConfigError(f"{key} must be a column or a key of a run's configuration; no run here has it; {hint}")


def select(rows: Sequence[Row], conditions: Sequence[tuple[str, str, str]], sort: str | None = None) -> list[Row]:
    """The rows for which every condition holds, sorted by a column: ascending, with a `-` before it descending.

    Numbers are compared as numbers, everything else as text; a row without a value fails a condition and comes last.
    """
    name = (sort or "").removeprefix("-")
    kept = [row for row in rows if all(_holds(row.get(key), sign, value) for key, sign, value in conditions)]
    if name:
        have = [row for row in kept if row.get(name) is not None]
        have.sort(key=lambda row: _sortable(row[name]), reverse=(sort or "").startswith("-"))
        kept = [*have, *(row for row in kept if row.get(name) is None)]
    return kept


def _holds(found: Any, sign: str, wanted: str) -> bool:
    if found is None:
        return False
    if isinstance(found, int | float) and not isinstance(found, bool):
        try:
            return COMPARE[sign](found, float(wanted))
        except ValueError:
            return COMPARE[sign](found, parse_count(wanted, "the value of a condition"))
    return COMPARE[sign](_text(found), wanted)


def _sortable(value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number, value if is_number else _text(value)


def _text(value: Any) -> str:
    """As TOML writes it: `true`, not `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(config: RunConfig, key: str) -> Any:
    """The value at a dotted key, items of lists by position or by their `name`; None where there is none."""
    value: Any = run_to_dict(config)
    for name in key.split("."):
        if isinstance(value, list):
            named = {str(i): item for i, item in enumerate(value)}
            named |= {item["name"]: item for item in value if isinstance(item, dict) and "name" in item}
            value = named
        value = value.get(name) if isinstance(value, dict) else None
    return None if isinstance(value, dict | list) else value


def _journaled_world(run: Run) -> int | None:
    """Ranks of the last start, from the journal of a run whose status does not say."""
    return next((line["world_size"] for line in reversed(run.journal()) if "world_size" in line), None)
