"""What a verb answers: one JSON document for programs, text for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The result of a verb. It goes to standard output: `document` with `--json`, else `text`."""

    document: Any
    text: str
    exit_code: int = 0


def to_json(document: Any) -> str:
    """The document as JSON in ASCII, whatever the stream takes; numbers that JSON lacks (nan, inf) become null."""
    return json.dumps(_plain(document), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """Nested plain values of dictionaries, sequences, dataclasses, tables, paths and numpy scalars."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(to_dict := getattr(value, "to_dict", None)):  # a pandas table: one object per row
        return _plain(to_dict(orient="records"))
    if callable(to_list := getattr(value, "tolist", None)):  # a numpy or torch scalar or array
        return _plain(to_list())
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text under their column names: numbers to the right, absent values as `-`."""
    if not rows:
        return ""
    names = list(columns or rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    right = [all(isinstance(row.get(n), int | float | None) for row in rows) for n in names]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]

    def line(texts: Sequence[str]) -> str:
        pairs = zip(texts, widths, right, strict=True)
        return "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in pairs).rstrip()

    return "\n".join([line(names), *(line(texts) for texts in cells)])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def byte_count(size: float) -> str:
    """A size for people: `3.2 MB` (powers of 1,000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def token_count(tokens: float) -> str:
    """A number of tokens for people: `1.6M`, `3T` (powers of 1,000)."""
    for unit in ("", "K", "M", "B"):
        if abs(tokens) < 1000:
            return f"{tokens:.3g}{unit}"
        tokens /= 1000
    return f"{tokens:.4g}T"
