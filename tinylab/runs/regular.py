"""The only way to open a file of a run folder: a regular file, never through a symbolic link, never a wait.

A run folder may come from anybody. Opened by `open`, a link named `metrics.jsonl` truncates the file it points to, a
FIFO waits for ever for its other end, and /dev/zero never ends.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from tinylab.errors import CheckpointError

MAX_BYTES = 64 * 2**20
"""Of a file that is read at once. The manifest of a checkpoint in 10,000 files has 1.5 MB."""
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False, mode: int = 0o600) -> int:
    """A descriptor of the regular file at `path`, opened with `flags`; a new file has `mode` less the umask.

    With `follow`, a symbolic link to a regular file will do: a model's files may be links into a cache.
    Raises CheckpointError, with the remedy, for anything but a regular file, and OSError as `os.open` does.
    """
    flags |= (0 if follow else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if problem := _problem(path):
            raise CheckpointError(problem) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(_problem(path) or f"{path} must be a regular file; it was replaced while it was opened")
    return descriptor


def _problem(path: Path) -> str | None:
    """What is at `path` in place of a regular file; None for a regular file and for nothing."""
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:
        return None
    found = _KINDS.get(kind)
    return found and f"{path} must be a regular file; found {found}. Move it away and repeat the same command"


def read_regular(path: Path, limit: int = MAX_BYTES, *, follow: bool = False) -> bytes:
    """The bytes of a regular file. Raises CheckpointError when it has more than `limit`, and as `open_regular`."""
    with open(open_regular(path, follow=follow), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path} must have at most {limit} bytes; found {size}. Restore it from a copy")
        return file.read(limit)


def read_json(path: Path, *, follow: bool = False) -> Any:
    """The JSON value in a regular file. Raises CheckpointError when it is none, and as `read_regular`."""
    try:
        return json.loads(read_regular(path, follow=follow))
    except (ValueError, RecursionError) as error:  # RecursionError: a file of brackets
        raise CheckpointError(f"{path} must be readable JSON; found: {error}. Restore it from a copy") from error
