"""The `files` corpus: text, JSON lines (plain, gzip, Zstandard) and Parquet. A new format is an entry of `_READERS`."""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinylab.data.corpus.document import NO_TEXT, TEXT_COLUMNS, Document, require_text_column, text_column
from tinylab.errors import DataError


def open_files(pattern: str, skipped: Counter[str]) -> Iterator[Document]:
    """The documents of every file that the pattern matches, sorted by path.

    Raises DataError at once if there is no file or one with an unknown ending, later for a file that is damaged.
    """
    paths = matching_files(pattern)
    if not paths:
        raise DataError(
            f"files:{pattern} must match at least one file; found none from {os.getcwd()}. "
            "Check the path; ** matches folders of any depth"
        )
    unknown = [p for p in paths if _reader(p) is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(
            f"files:{pattern} must match files ending in {', '.join(_READERS)}; found {', '.join(unknown[:3])}{more}. "
            "Narrow the pattern"
        )
    return (document for path in paths for document in _read_file(path, skipped))


def matching_files(pattern: str) -> list[str]:
    """Paths of the files that a pattern matches, sorted; a file of exactly that name, such as `a[1].txt`, is itself."""
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    found = {p for a in _alternatives(pattern) for p in glob.glob(a, recursive=True) if not os.path.isdir(p)}
    return sorted(found)


def listing(pattern: str) -> dict[str, Any] | None:
    """How many files a pattern or folder holds now, and a digest of their names and sizes; None if there are none."""
    folder = os.path.isdir(os.path.expanduser(pattern))
    paths = matching_files(os.path.join(pattern, "**/*") if folder else pattern)
    digest = hashlib.sha256()
    for path in paths:
        size = os.stat(path).st_size if os.path.exists(path) else -1  # reading it reports what is wrong with it
        digest.update(os.fsencode(path) + b"\0%d\0" % size)
    return {"files": len(paths), "sha256": digest.hexdigest()} if paths else None


def _alternatives(pattern: str) -> list[str]:
    """A pattern with `{a,b}` written out, from the first brace on."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [p for choice in match[1].split(",") for p in _alternatives(head + choice + tail)]


def _read_file(path: str, skipped: Counter[str]) -> Iterator[Document]:
    reader = _reader(path)
    assert reader is not None
    try:
        yield from reader(path, skipped)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            f"{path} must be readable; found: {reason}. Restore the file or its permissions, "
            "or leave it out of the pattern"
        ) from error


def _reader(path: str) -> Callable[[str, Counter[str]], Iterator[Document]] | None:
    return next((reader for ending, reader in _READERS.items() if path.lower().endswith(ending)), None)


def _read_text(path: str, skipped: Counter[str]) -> Iterator[Document]:
    try:
        yield Document(Path(path).read_bytes().decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must be UTF-8; found byte {error.object[error.start]:#04x} at {error.start}. Convert the file"
        ) from error


def _read_jsonl(path: str, skipped: Counter[str]) -> Iterator[Document]:
    with open(path, "rb") as file:
        if path.lower().endswith(".jsonl"):
            yield from _json_lines(path, file, skipped)
            return
        if not os.fstat(file.fileno()).st_size:  # an empty text still has a header
            raise EOFError("a compressed file of no bytes, such as a failed download leaves")
        with _decompressed(path, file) as content:
            yield from _json_lines(path, content, skipped)


def _decompressed(path: str, file: Any) -> Any:
    """The content of a .gz or .zst file of any number of members or frames; a cut one is an error."""
    if path.lower().endswith(".gz"):
        return gzip.open(file)
    import pyarrow  # zstandard's own reader takes a cut frame for the end of the file

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


def _json_lines(path: str, file: Any, skipped: Counter[str]) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} must be JSON; found: {error}. Mend or remove the line") from error
        field = text_column(record) if isinstance(record, dict) else None
        if field is None:
            found = ", ".join(record) or "no field" if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}, line {number} must be an object with the field {' or '.join(TEXT_COLUMNS)}; found {found}"
            )
        if isinstance(record[field], str):
            yield Document(record[field], f"{path}:{number}")
        else:
            skipped[NO_TEXT] += 1


def _read_parquet(path: str, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = require_text_column(path, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield Document(text, f"{path}:{number}")
                else:
                    skipped[NO_TEXT] += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be a Parquet file of UTF-8 text; found: {error}. Restore the file") from error


_READERS: dict[str, Callable[[str, Counter[str]], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}
"""The reader of each ending: text files are one document, JSON lines one per line, Parquet one per row."""
