"""`journal.jsonl`: one line per event of a run, on the device before the run continues."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from tinylab.runs.sealed_log import SealedLog

LATEST_S = 1e11
"""Unix time of the year 5138: what is later is damage."""


class JournalLog(SealedLog):
    """Appends events to `journal.jsonl`, from any thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._appending = threading.Lock()

    def write(self, event: str, **more: Any) -> None:
        """Append one fsynced line: event, time (Unix s), and what belongs to it."""
        with self._appending:
            self.append({"event": event, "time": time.time(), **more}, sync=True)

    def problem(self, record: dict[str, Any], previous: dict[str, Any]) -> str | None:
        """Why a line is no event: `event` must be text and `time` a number."""
        if not isinstance(record.get("event"), str):
            return f"event must be text; found {str(record.get('event'))[:80]!r}"
        if not isinstance(record.get("time"), int | float) or not 0 <= record["time"] < LATEST_S:
            return f"time must be a number; found {str(record.get('time'))[:80]!r}"
        return None

    def is_later(self, record: dict[str, Any], last: dict[str, Any]) -> bool:
        """Whether the event came later."""
        return record["time"] >= last["time"]
