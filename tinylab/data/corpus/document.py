"""What every source yields, and the names under which rows hold their text."""

from collections.abc import Container
from dataclasses import dataclass

from tinylab.errors import DataError

TEXT_COLUMNS = ("text", "content")
"""Fields and columns that may hold the document, in order of preference (starcoderdata has `content`)."""
NO_TEXT = "rows without text"
"""The reason under which rows whose text is null or no string are counted."""


@dataclass(frozen=True)
class Document:
    """A text and its provenance."""

    text: str
    origin: str
    """Where it came from: `stdlib:json/decoder.py`, `package:numpy/METADATA`, `books.jsonl.gz:17`, `hf:NAME:train:9`"""


def text_column(names: Container[str]) -> str | None:
    """The field or column that holds the document; None where there is none."""
    return next((name for name in TEXT_COLUMNS if name in names), None)


def require_text_column(where: str, names: list[str]) -> str:
    """The column of `names` that holds the document. Raises DataError, naming `where`, if there is none."""
    column = text_column(names)
    if column is None:
        raise DataError(f"{where} must have a column {' or '.join(TEXT_COLUMNS)}; found {', '.join(names) or 'none'}")
    return column
