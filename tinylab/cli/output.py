"""What a verb answers: one JSON document for programs, text for people."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinylab.runs.plain import to_plain


@dataclass(frozen=True)
class Answer:
    """The result of a verb, printed on standard output: `document` with `--json`, else `text`."""

    document: Any
    text: str
    exit_code: int = 0


def to_json(document: Any) -> str:
    """The document as JSON in ASCII, for any stream; numbers that JSON lacks (nan, inf) become null."""
    return json.dumps(to_plain(document), indent=1, allow_nan=False)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as text in columns under their names: numbers right-aligned, absent values as `-`."""
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
