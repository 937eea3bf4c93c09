"""The one way from model or data text into HTML: outputs of one's own kernel run scripts in JupyterLab."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_BLANK = re.compile(r"\n{4,}")
_CELL = "padding:0.15em 0.8em;"
_TEXT_CELL = _CELL + "text-align:left;vertical-align:top;max-width:46em;overflow-wrap:break-word;white-space:pre-wrap"
_MARKUP = {c: f"&#{ord(c)};" for c in "&<>\"'`$%\\*_~[]{}|"}
"""HTML's own characters, and those that Markdown and MathJax act on ($, %, backslash, brackets …)."""


def escape(text: Any) -> str:
    """`text` safe inside HTML text and quoted attributes, showing what it hides.

    Terminal colours vanish; NUL, other controls, bidirectional and zero-width characters become `[U+202E]`; markup,
    `$` and backslashes become numeric entities, so neither HTML, Markdown nor MathJax acts on them.
    """
    plain = _INVISIBLE.sub(lambda m: f"[U+{ord(m[0]):04X}]", _ANSI.sub("", str(text)))
    return "".join(_MARKUP.get(c, c) for c in plain)


def table_html(table: pandas.DataFrame, caption: str = "", digits: int = 4) -> str:
    """A DataFrame as an HTML table, numbers right-aligned, every text escaped, its index left out."""
    head = "".join(f'<th style="{_CELL}text-align:left">{escape(c)}</th>' for c in table.columns)
    rows = []
    for row in table.itertuples(index=False, name=None):
        rows.append("<tr>" + "".join(_cell(value, digits) for value in row) + "</tr>")
    if not rows:
        rows = [f'<tr><td colspan="{max(1, len(table.columns))}" style="text-align:left">none</td></tr>']
    title = f'<caption style="white-space:nowrap;text-align:left;font-weight:600">{escape(caption)}</caption>'
    title = title if caption else ""
    return f'<table class="tinylab">{title}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _line_ends(found: re.Match[str]) -> str:
    """A model may say nothing but line ends: their number instead of a page of white."""
    return f"\n[{len(found[0])} line ends]\n"


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        words = {True: "yes", False: "no", None: ""}
        text = words[value] if value is None or isinstance(value, bool) else _BLANK.sub(_line_ends, str(value))
        return f'<td style="{_TEXT_CELL}">{escape(text)}</td>'
    number = float(value)
    if number != number:
        text = "n/a"
    elif math.isfinite(number) and number == int(number) and abs(number) < 1e15:
        text = f"{int(number):,}"
    else:
        text = f"{number:.{digits}g}"
    return f'<td style="{_CELL}text-align:right;vertical-align:top">{text}</td>'
