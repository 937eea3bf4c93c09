"""What a notebook cell shows and keeps: HTML, tables, and a widget beside its static twin."""

from typing import Any

from tinylab.html.tables import table_html


class Html:
    """HTML that a notebook shows and keeps, with a text for where no HTML is shown."""

    def __init__(self, html: str, text: str) -> None:
        self.html = html
        self.text = text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def show_table(rows: Any, caption: str = "", digits: int = 4) -> Html:
    """A DataFrame, a list of dictionaries, or one dictionary (as two columns) as a table with all text escaped."""
    return Html(table_html(rows, caption, digits), f"{caption}: {len(rows)} rows" if caption else f"{len(rows)} rows")


def bundle(widget: Any, twin: Html) -> dict[str, Any]:
    """A MIME bundle with the live view and its static twin.

    Without a widget (under papermill nobody can click) the bundle has no live view, for which an exported page would
    wait in vain.
    """
    fallback = {"text/html": twin.html, "text/plain": twin.text}
    if widget is None:
        return fallback
    live = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": live, **fallback}
