"""Files that survive a kill: write, fsync, rename, fsync the parent. Named points where tests kill the process."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tinylab.errors import CheckpointError
from tinylab.runs.regular import open_regular

MAX_LINE_BYTES = 2**23
"""Of one line of JSON: longer is damage. A step's line has about 400."""
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
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not wait for its other end
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
        temporary.unlink(missing_ok=True)  # of a killed process that had the same number
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o666), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        failpoint("atomic.written")
        os.replace(temporary, path)
        if sync:
            fsync_path(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(path, error, len(data)) from error


def append_line(path: Path, record: dict[str, Any], *, sync: bool) -> None:
    """Append one JSON line, handed to the operating system before returning (and to the device if `sync`)."""
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        with open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
            end, left = file.tell(), line
            try:
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # else the next line would be glued to this one's beginning
                raise
    except OSError as error:
        raise disk_error(path, error, len(line)) from error


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of the complete lines from byte `offset`, and the offset behind the last of them.

    A torn last line (no newline yet) is left for the next call. A missing file is empty.
    Raises CheckpointError naming the line when a complete line is not a JSON object, and as `open_regular`.
    """
    records, behind = [], offset
    for number, (line, end) in enumerate(complete_lines(path, offset), start=1):
        record = parse_line(line)
        if record is None:
            found = line[:-1][:80]
            raise CheckpointError(f"{path}, line {number} after byte {offset} must be a JSON object; found {found!r}")
        records.append(record)
        behind = end
    return records, behind


def complete_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Each complete line from byte `offset`, with its newline, and the offset behind it. A missing file has none.

    Raises CheckpointError naming a line longer than MAX_LINE_BYTES: it may be a hole of a terabyte.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return
    with open(descriptor, "rb") as file:
        file.seek(offset)
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            offset += len(line)
            yield line, offset
        if len(line) == MAX_LINE_BYTES:
            raise CheckpointError(
                f"{path}, line at byte {offset} must end within {MAX_LINE_BYTES} bytes; found more: {line[:80]!r}"
            )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def repair_tail(path: Path) -> None:
    """Cut a torn last line (a kill in the middle of an append); other lines stay byte for byte.

    What is longer than MAX_LINE_BYTES is no torn line and stays.
    """
    with suppress(FileNotFoundError), open(open_regular(path, os.O_RDWR), "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end and not (block := _block_before(file, end)).endswith(b"\n"):
            end = end - len(block) + block.rfind(b"\n") + 1
            if size - end > MAX_LINE_BYTES:
                return
        if end < size:
            file.truncate(end)


def _block_before(file: BinaryIO, end: int) -> bytes:
    """The last bytes before `end`, at most 64 KiB."""
    start = file.seek(max(0, end - 65_536))
    return file.read(end - start)


def disk_error(path: Path, error: Exception, needed: int | None = None) -> CheckpointError:
    """A CheckpointError that names the path, what went wrong, bytes needed and bytes free.

    `error` is an OSError, or one of a library whose text ends as Rust's do: (os error 28).
    """
    reason, number = getattr(error, "strerror", None) or str(error), getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", reason)):
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
