"""`status.json`: how a run goes, and whether what it says can still be true."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError
from tinylab.runs.durable import process_exists
from tinylab.runs.regular import read_json

STATES = ("running", "done", "stopped", "failed")
"""What a trainer writes; readers also say `none` and `lost`."""
STALE_HEARTBEAT_S = 120.0
"""Silence after which a running process counts as gone, and the least time that it may take to make progress."""
_DAY_S = 86_400.0


def new_status(state: str, step: int, **more: Any) -> dict[str, Any]:
    """The content of `status.json`: `state`, `step`, `pid`, `host`, and two times in Unix seconds.

    `alive` is now; `heartbeat`, the last progress, is now too unless `more` gives an earlier one. `allowance_s` in
    `more` is how long the run may take until its next progress, and `doing` what it does meanwhile.
    """
    now = time.time()
    place = {"pid": os.getpid(), "host": socket.gethostname()}
    return {"state": state, "step": step, **place, "heartbeat": now, "alive": now, **more}


def read_status(path: Path) -> dict[str, Any]:
    """The status at `path`, or state `none` where there is no readable one.

    A status that says `running` becomes `lost`, with the `reason`, when its process is gone or silent, or lives
    without progress for longer than it may.
    """
    try:
        status = read_json(path)
    except (CheckpointError, OSError):
        return {"state": "none", "step": 0}
    if not _is_valid(status):
        return {"state": "none", "step": 0}
    if _seconds(status.get("heartbeat")) is None:
        status.pop("heartbeat", None)
    if status["state"] == "running" and (reason := why_lost(status)):
        status |= {"state": "lost", "reason": reason}
    return status


def why_lost(status: dict[str, Any]) -> str | None:
    """Why a valid status that says `running` is no longer true; None while it may be."""
    pid, host, heartbeat = status["pid"], status["host"], status["heartbeat"]
    here = host == socket.gethostname()
    if here and not process_exists(pid):
        return f"its process {pid} is gone"
    now = time.time()
    silent = now - (_seconds(status.get("alive")) or heartbeat)
    if not -_DAY_S < silent < STALE_HEARTBEAT_S:
        return f"process {pid} on {host} has given no sign of life for {silent:.0f} s"
    idle, allowance = now - heartbeat, max(STALE_HEARTBEAT_S, _seconds(status.get("allowance_s")) or 0.0)
    if not -_DAY_S < idle < allowance:
        where = f"{str(status.get('doing', 'training'))[:80]}, after step {status['step']}"
        return f"no progress for {idle:.0f} s ({where}); process {pid} on {host} still runs"
    return None


def other_host(status: dict[str, Any]) -> str | None:
    """The process on another host that trains by this status, stuck or not; None where none has shown life lately."""
    if status["state"] not in ("running", "lost") or status["host"] == socket.gethostname():
        return None
    silent = time.time() - (_seconds(status.get("alive")) or _seconds(status.get("heartbeat")) or 0.0)
    return f"pid {status['pid']} on {status['host']}, alive {silent:.0f} s ago" if silent < STALE_HEARTBEAT_S else None


def _is_valid(status: Any) -> bool:
    if not isinstance(status, dict) or status.get("state") not in STATES or type(status.get("step")) is not int:
        return False
    pid, host = status.get("pid"), status.get("host")
    return status["state"] != "running" or (
        type(pid) is int and 0 < pid < 2**31 and isinstance(host, str) and _seconds(status.get("heartbeat")) is not None
    )


def _seconds(value: Any) -> float | None:
    """`value` if it is a number of seconds; None for text, nan, infinity or an integer beyond any float."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e15 else None
