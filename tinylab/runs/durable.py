"""Files that survive a kill: write, fsync, rename, fsync the parent. Named points where tests kill the process."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError

_hits: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Kill this process here if TINYLAB_FAILPOINT is `name` or `name:hit` (the hit counts from 1).

    Tests use it to stop at every labelled point of save, publish, prune and resume.
    """
    wanted, _, hit = os.environ.get("TINYLAB_FAILPOINT", "").partition(":")
    if wanted == name:
        _hits[name] = _hits.get(name, 0) + 1
        if _hits[name] == int(hit or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def process_exists(pid: int) -> bool:
    """Whether a process of this host has the number `pid`; it may be another user's, or a later one's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the device, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes, *, sync: bool = True) -> None:
    """Put `data` at `path`: readers see the old file or the new one, never a part.

    Raises CheckpointError naming the path and the free space when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        failpoint("atomic.written")
        os.replace(temporary, path)
        if sync:
            fsync_path(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error, len(data)) from error


def append_line(path: Path, record: dict[str, Any], *, sync: bool) -> None:
    """Append one JSON line, handed to the operating system before returning (and to the device if `sync`)."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            end, left = file.tell(), line
            try:
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, end)  # else the next line would be glued to this one's beginning
                raise
    except OSError as error:
        raise disk_error(path, error, len(line)) from error


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of the complete lines from byte `offset`, and the offset behind the last of them.

    A torn last line (no newline yet) is left for the next call. A missing file is empty.
    Raises CheckpointError naming the line when a complete line is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise CheckpointError(
                f"{path}, line {number} after byte {offset} must be a JSON object; found {line[:80]!r}"
            )
        records.append(record)
    return records, offset + len(complete)


def repair_tail(path: Path) -> None:
    """Cut a torn last line (a kill in the middle of an append); other lines stay byte for byte."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def disk_error(path: Path, error: OSError, needed: int | None = None) -> CheckpointError:
    """A CheckpointError that names the path, what went wrong, bytes needed and bytes free."""
    reason, number = error.strerror or str(error), error.errno
    if number is None and (found := re.search(r"\(os error (\d+)\)", reason)):  # how libraries in Rust tell it
        number = int(found[1])
        reason = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        parent = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(parent).free
        need = f"{needed} bytes needed, " if needed else ""
        return CheckpointError(
            f"cannot write {path}: {reason} ({need}{free} bytes free); make room and repeat the same command"
        )
    return CheckpointError(f"cannot write {path}: {reason}; check the path and its permissions")
