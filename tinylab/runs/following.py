"""A run's metrics, followed while another process appends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylab.runs.durable import read_lines
from tinylab.runs.regular import open_regular

TAIL = 1024
"""Bytes before the offset, a line or two, that must be unchanged: a resume cuts lines off and writes others."""


class MetricsReader:
    """Every line of `metrics.jsonl` so far; each call reads only what is new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[dict[str, Any]] = []
        self._offset = 0
        self._tail = b""

    def read(self) -> list[dict[str, Any]]:
        """The lines by now. After a resume that cut lines off, all are read again."""
        if _before(self._path, self._offset, len(self._tail)) != self._tail:
            self._records, self._offset = [], 0
        new, self._offset = read_lines(self._path, self._offset)
        self._records += new
        self._tail = _before(self._path, self._offset, TAIL)
        return list(self._records)


def _before(path: Path, offset: int, size: int) -> bytes:
    """The `size` bytes before `offset`; fewer where the file has no more."""
    if not path.exists():
        return b""
    start = max(0, offset - size)
    with open(open_regular(path), "rb") as file:
        file.seek(start)
        return file.read(offset - start)
