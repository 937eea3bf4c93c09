"""Named sources of documents: this Python environment, files, Hugging Face data sets.

A corpus is an iterator of documents in an order that depends on names alone, never on how a folder is listed.
It reads as it goes: whoever has enough stops, and nothing further is opened.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.data.corpus import environment
from tinylab.errors import DataError

TEXT_COLUMNS = ("text", "content")
"""Fields and columns that may hold the document, the first one found (starcoderdata has `content`)."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text and its provenance."""

    text: str
    origin: str
    """Where it came from: `stdlib:json/decoder.py`, `package:numpy/METADATA`, `books.jsonl.gz:17`, `hf:NAME:train:9`"""


def open_corpus(spec: str, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of `local:prose`, `local:code`, `files:GLOB` or `hf:NAME[:CONFIG]`.

    `skipped` counts by reason what was passed over: unreadable files of the environment, rows without text.
    GLOB is recursive (`**`) and may list alternatives (`docs/**/*.{md,txt}`): .txt, .md, .py are one document each,
    .jsonl, .jsonl.gz, .jsonl.zst one per line, .parquet one per row (field or column `text`, else `content`).
    Raises DataError when the corpus does not exist, and while iterating when a file given by name is damaged.
    """
    skipped = Counter() if skipped is None else skipped
    kind, _, rest = spec.partition(":")
    if kind == "local" and rest in _LOCAL:
        return (Document(text, origin) for text, origin in _LOCAL[rest](skipped))
    if kind == "files" and rest:
        return _open_files(rest, skipped)
    if kind == "hf" and rest:
        return _open_huggingface(rest, skipped)
    raise DataError(
        f"a corpus must be local:prose, local:code, files:GLOB or hf:NAME[:CONFIG]; found {spec!r}. "
        "Change data.sources.corpus"
    )


_LOCAL: dict[str, Callable[[Counter[str]], Iterator[tuple[str, str]]]] = {
    "prose": environment.prose,
    "code": environment.code,
}


def _open_files(pattern: str, skipped: Counter[str]) -> Iterator[Document]:
    """Every file that the pattern matches, sorted by path; all endings are checked before the first is read."""
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
        size = os.stat(path).st_size if os.path.exists(path) else -1  # reading it names what is wrong with it
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
        yield from _json_lines(path, file, skipped)


def _read_jsonl_gz(path: str, skipped: Counter[str]) -> Iterator[Document]:
    with open(path, "rb") as packed, gzip.open(packed) as file:
        _require_content(packed)
        yield from _json_lines(path, file, skipped)


def _read_jsonl_zst(path: str, skipped: Counter[str]) -> Iterator[Document]:
    with open(path, "rb") as packed:
        _require_content(packed)
        yield from _json_lines(path, io.BufferedReader(_ZstdFrames(packed)), skipped)


def _require_content(packed: Any) -> None:
    """Refuse a compressed file of no bytes (an empty text still has a header): what a failed download leaves."""
    if os.fstat(packed.fileno()).st_size == 0:
        raise EOFError("a compressed file of no bytes")


class _ZstdFrames(io.RawIOBase):
    """The content of Zstandard frames, one after the other; unlike the library's reader it refuses a cut one."""

    def __init__(self, file: Any) -> None:
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")  # a slice of a view copies nothing: one read may give gigabytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


def _json_lines(path: str, file: Any, skipped: Counter[str]) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} must be JSON; found: {error}. Mend or remove the line") from error
        field = _text_column(record) if isinstance(record, dict) else None
        if field is None:
            found = ", ".join(record) or "no field" if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}, line {number} must be an object with the field {' or '.join(TEXT_COLUMNS)}; found {found}"
            )
        if isinstance(record[field], str):
            yield Document(record[field], f"{path}:{number}")
        else:
            skipped["rows without text"] += 1


def _text_column(names: Container[str]) -> str | None:
    """The field or column that holds the document; None where there is none."""
    return next((name for name in TEXT_COLUMNS if name in names), None)


def _read_parquet(path: str, skipped: Counter[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        column = _text_column(names)
        if column is None:
            raise DataError(
                f"{path} must have a column {' or '.join(TEXT_COLUMNS)}; found {', '.join(names) or 'none'}"
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield Document(text, f"{path}:{number}")
                else:
                    skipped["rows without text"] += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be a Parquet file of UTF-8 text; found: {error}. Restore the file") from error


_READERS: dict[str, Callable[[str, Counter[str]], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}


def _open_huggingface(name: str, skipped: Counter[str]) -> Iterator[Document]:
    """Rows of the `train` split of a data set on the Hub or in a local folder, streamed; no code of it is run."""
    import datasets

    name, _, config = name.partition(":")
    spec = f"hf:{name}" + (f":{config}" if config else "")
    name = os.path.expanduser(name)
    try:
        if (Path(name) / "state.json").exists():
            rows: Any = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        columns = list(rows.features or next(iter(rows), {}))
    except Exception as error:  # the library raises many kinds: not found, offline, gated, malformed
        raise _unavailable(spec, name, error) from error
    column = _text_column(columns)
    if column is None:
        raise DataError(f"{spec} must have a column {' or '.join(TEXT_COLUMNS)}; found {', '.join(columns) or 'none'}")
    return _huggingface_rows(spec, name, rows, column, skipped)


def _huggingface_rows(spec: str, name: str, rows: Any, column: str, skipped: Counter[str]) -> Iterator[Document]:
    iterator = enumerate(iter(rows))
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _unavailable(spec, name, error) from error
        if isinstance(row[column], str):
            yield Document(row[column], f"{spec}:train:{number}")
        else:
            skipped["rows without text"] += 1


def _unavailable(spec: str, name: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return DataError(f"{spec} must be a data set folder with a `train` split; found: {reason}")
    return DataError(
        f"{spec} must be a data set that can be reached; found: {reason}. Check the name, the network and the login "
        "(hf auth login), or point data.sources.corpus at local files (files:GLOB) or a folder (hf:FOLDER)"
    )
