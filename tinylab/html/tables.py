"""Tables as HTML: one look in notebooks, forms and reports, numbers to the right, every text escaped."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from tinylab.html.escape import escape
from tinylab.runs.plain import to_plain

_BLANK = re.compile(r"\n{4,}")
_CELL = "padding:0.15em 0.8em;text-align:{};vertical-align:top"
_NUMBER = _CELL.format("right")
_TEXT = _CELL.format("left") + ";max-width:46em;overflow-wrap:break-word;white-space:pre-wrap"


def table_html(
    rows: pandas.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Any], caption: str = "", digits: int = 4
) -> str:
    """A table of a DataFrame (without its index), of a list of rows, or of one mapping, a key and its value a row."""
    if isinstance(rows, Mapping):
        rows = [{"": key, "value": _value_text(value, digits)} for key, value in rows.items()]
    table = rows if isinstance(rows, pandas.DataFrame) else pandas.DataFrame(rows)  # type: ignore[arg-type]
    head = "".join(f'<th style="{_CELL.format("left")}">{escape(column)}</th>' for column in table.columns)
    body = [
        "<tr>"
        + "".join(
            f'<td style="{_NUMBER if _is_number(v) else _TEXT}">{escape(_value_text(v, digits))}</td>' for v in row
        )
        + "</tr>"
        for row in table.itertuples(index=False, name=None)
    ] or [f'<tr><td colspan="{max(1, len(table.columns))}" style="text-align:left">none</td></tr>']
    title = f'<caption style="white-space:nowrap;text-align:left;font-weight:600">{escape(caption)}</caption>'
    return (
        f'<table class="tinylab">{title if caption else ""}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _value_text(value: Any, digits: int) -> str:
    """`1,234`, `0.1235`, `n/a`, `yes`; lists and mappings as JSON; a run of line ends as their number."""
    if _is_number(value):
        number = float(value)
        if math.isnan(number):
            return "n/a"
        whole = number.is_integer() and abs(number) < 1e15
        return f"{int(number):,}" if whole else f"{number:.{digits}g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    text = json.dumps(to_plain(value), ensure_ascii=False) if isinstance(value, Mapping | list | tuple) else str(value)
    return _BLANK.sub(lambda found: f"\n[{len(found[0])} line ends]\n", text)
