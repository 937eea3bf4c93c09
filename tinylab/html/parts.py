"""Parts of a view as HTML. Each takes plain text, which it escapes; only `framed` takes HTML, that of other parts."""

import base64
from collections.abc import Iterable
from typing import Protocol

from tinylab.html.escape import escape


class Picture(Protocol):
    """A figure that draws itself as PNG and knows its width and height in inches, as those of plots do."""

    def png(self) -> bytes: ...
    def get_size_inches(self) -> Iterable[float]: ...


def heading(text: str, level: int = 3) -> str:
    """A heading of a section (3) or of a part of one (4)."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: object, *, note: bool = False) -> str:
    """One paragraph; a note is grey in a report."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    """A list of remarks, nothing for none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def code(text: str) -> str:
    """Lines as they are, in a fixed-width font."""
    return f"<pre>{escape(text)}</pre>"


def picture(figure: Picture, alt: str) -> str:
    """A figure as an image that carries its own pixels; `alt` says what it shows."""
    width, _ = figure.get_size_inches()
    pixels = base64.b64encode(figure.png()).decode()
    return (
        f'<img alt="{escape(alt)}" width="{round(96 * width)}" style="max-width:100%;height:auto" '
        f'src="data:image/png;base64,{pixels}">'
    )


def captioned(figure: Picture, caption: str) -> str:
    """A figure with its caption below, which is its alternative text too."""
    return f"<figure>{picture(figure, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def error(error: BaseException, doing: str) -> str:
    """What went wrong, in words, where the result would have been."""
    return f'<p role="alert"><b>{escape(doing)} failed.</b> {escape(type(error).__name__)}: {escape(error)}</p>'


def framed(parts: Iterable[str]) -> str:
    """Parts one below the other, as wide as their place and no wider: a table may scroll, but stretches no form."""
    return f'<div style="width:0;min-width:100%;overflow-x:auto;line-height:1.35">{"".join(parts)}</div>'
