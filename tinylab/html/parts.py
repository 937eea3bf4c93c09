"""Pieces of HTML that views share: tables, figures as embedded PNG, an error that is shown instead of lost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from tinylab.html.escape import escape, table_html
from tinylab.plots.style import LabFigure


class Html:
    """HTML that a notebook shows and keeps; made only from escaped text."""

    def __init__(self, html: str, text: str = "") -> None:
        self.html = html
        self.text = text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text or f"HTML of {len(self.html)} characters"


def show_table(rows: Any, caption: str = "", digits: int = 4) -> Html:
    """A DataFrame, a list of dictionaries, or one dictionary (as two columns) as a table with all text escaped."""
    import pandas

    if isinstance(rows, Mapping):
        rows = pandas.DataFrame({"": list(rows), "value": [_text(value, digits) for value in rows.values()]})
    elif isinstance(rows, Sequence):
        rows = pandas.DataFrame(rows)
    return Html(table_html(rows, caption, digits), f"{caption}: {len(rows)} rows" if caption else f"{len(rows)} rows")


def _text(value: Any, digits: int) -> str:
    """A value in a column of texts."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def figure_html(figure: LabFigure, alt: str) -> str:
    """A figure as an `img` that carries its own pixels; `alt` says what it shows."""
    width = round(96 * figure.get_size_inches()[0])
    picture = base64.b64encode(figure.png()).decode()
    return (
        f'<img alt="{escape(alt)}" width="{width}" style="max-width:100%;height:auto" '
        f'src="data:image/png;base64,{picture}">'
    )


def error_html(error: BaseException, doing: str) -> str:
    """What went wrong, in words, where the result would have been."""
    return f'<p role="alert"><b>{escape(doing)} failed.</b> {escape(type(error).__name__)}: {escape(error)}</p>'


def bundle(widget: Any, html: str, text: str) -> dict[str, Any]:
    """A MIME bundle with the live view and its fallback.

    `widget` None (papermill: nobody can click) leaves the view out: an exported page would wait for it in vain.
    """
    fallback = {"text/html": html, "text/plain": text}
    if widget is None:
        return fallback
    live = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": live, **fallback}
