"""Prepared data, read: memory-mapped token streams with document boundaries, checked by SHA-256 before the first token.

The layout on disk, and the writer, are in packing.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinylab.data.shards.integrity import damaged_files, read_manifest
from tinylab.data.shards.writer import (
    DTYPES,
    SHARD_TOKENS,
    SPLITS,
    START,
    ShardWriter,
    build_manifest,
    fingerprint_of,
    source_entry,
)
from tinylab.errors import DataError

__all__ = [
    "SHARD_TOKENS",
    "DocumentSpan",
    "ShardSet",
    "ShardWriter",
    "TokenStream",
    "build_manifest",
    "fingerprint_of",
    "open_shards",
    "source_entry",
]


@dataclass(frozen=True)
class DocumentSpan:
    """The part of one document that lies in a range of tokens."""

    origin: str
    """Where the document came from, e.g. `stdlib:json/decoder.py`."""
    sha256: str
    """Digest of the document's whole text."""
    start: int
    """First token of the part, relative to the range."""
    stop: int
    """One past its last token, relative to the range."""
    document: int
    """Number of the document in the stream."""


class TokenStream:
    """The tokens of one source in one split: the concatenation of its shards, read on demand."""

    def __init__(self, root: Path, entry: Mapping[str, Any]) -> None:
        self.n_tokens: int = entry["tokens"]
        self.n_documents: int = entry["documents"]
        self.n_bytes: int = entry["bytes"]
        self._shards = [_Shard(root, record) for record in entry["shards"]]
        self._token_ends = np.cumsum([r["tokens"] for r in entry["shards"]], dtype=np.int64)
        self._document_ends = np.cumsum([r["documents"] for r in entry["shards"]], dtype=np.int64)

    def n_windows(self, seq_len: int) -> int:
        """Samples of `seq_len` inputs and targets: windows overlap by one token, the rest of 1…seq_len is left."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, across shard borders, in the stored type."""
        return self.read_many(np.array([start], dtype=np.int64), count)[0]

    def read_many(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Tokens [s, s + count) for each s of `starts`: (len(starts), count) in the stored type."""
        starts = np.asarray(starts, dtype=np.int64)
        if len(starts) and (count < 0 or starts.min() < 0 or int(starts.max()) + count > self.n_tokens):
            raise IndexError(f"range outside the stream's {self.n_tokens} tokens")
        if not self._shards:
            return np.empty((len(starts), count), dtype=DTYPES["uint16"])
        out = np.empty((len(starts), count), dtype=self._shards[0].ids.dtype)
        first = np.searchsorted(self._token_ends, starts, side="right")
        last = np.searchsorted(self._token_ends, starts + max(count - 1, 0), side="right")
        for number in np.unique(first):
            inside = (first == number) & (last == number)
            if count and inside.any():
                shard = self._shards[number]
                windows = np.lib.stride_tricks.sliding_window_view(shard.ids, count)
                out[inside] = windows[starts[inside] - (self._token_ends[number] - len(shard.ids))]
        for row in np.flatnonzero(first != last):
            filled = 0
            for number in range(first[row], last[row] + 1):
                shard = self._shards[number]
                begin = int(starts[row]) + filled - int(self._token_ends[number] - len(shard.ids))
                part = shard.ids[begin : begin + count - filled]
                out[row, filled : filled + len(part)] = part
                filled += len(part)
        return out

    def locate(self, position: int) -> str:
        """The file and the token in it at a position of the stream, for messages."""
        number = int(np.searchsorted(self._token_ends, position, side="right"))
        return f"{self._shards[number].path}, token {position - self._tokens_before(number)}"

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Positions in [start, start + count), relative to `start`, at which a document begins: int64, ascending."""
        found = [np.empty(0, dtype=np.int64)]
        number = int(np.searchsorted(self._token_ends, start, side="right"))
        while number < len(self._shards) and self._tokens_before(number) < start + count:
            offset, starts = start - self._tokens_before(number), self._shards[number].starts
            low, high = np.searchsorted(starts, [offset, offset + count], side="left")
            found.append(starts[low:high] - offset)
            number += 1
        return np.concatenate(found)

    def documents(self, start: int, count: int) -> list[DocumentSpan]:
        """The documents that tokens [start, start + count) belong to, in order."""
        if count <= 0 or not self.n_documents:
            return []
        first = self._document_at_or_after(start + 1) - 1
        spans = []
        for i in range(first, self._document_at_or_after(start + count)):
            begin, end = self._document_start(i), self._document_start(i + 1)
            line = self.document_line(i)
            low, high = max(begin, start) - start, min(end, start + count) - start
            spans.append(DocumentSpan(line["origin"], line["sha256"], low, high, i))
        return spans

    def document_text_ids(self, i: int) -> np.ndarray:
        """Ids of document `i`, boundary ids included."""
        begin = self._document_start(i)
        return self.read(begin, self._document_start(i + 1) - begin)

    def document_origin(self, i: int) -> str:
        """Where document `i` came from."""
        return self.document_line(i)["origin"]

    def document_line(self, i: int) -> dict[str, Any]:
        """What is stored about document `i`: origin, bytes and sha256 of its text, tokens."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} outside the stream's {self.n_documents} documents")
        number = int(np.searchsorted(self._document_ends, i, side="right"))
        return self._shards[number].line(i - self._documents_before(number))

    def _documents_before(self, number: int) -> int:
        return int(self._document_ends[number - 1]) if number else 0

    def _tokens_before(self, number: int) -> int:
        return int(self._token_ends[number - 1]) if number else 0

    def _document_start(self, i: int) -> int:
        """Position of the first token of document `i`; the stream's length for the one past the last."""
        if i >= self.n_documents:
            return self.n_tokens
        number = int(np.searchsorted(self._document_ends, i, side="right"))
        return self._tokens_before(number) + int(self._shards[number].starts[i - self._documents_before(number)])

    def _document_at_or_after(self, position: int) -> int:
        """Number of the first document that begins at `position` or later."""
        if position >= self.n_tokens:
            return self.n_documents
        number = int(np.searchsorted(self._token_ends, position, side="right"))
        inside = np.searchsorted(self._shards[number].starts, position - self._tokens_before(number), side="left")
        return self._documents_before(number) + int(inside)


class _Shard:
    """One shard's files as memory maps, opened at first use."""

    def __init__(self, root: Path, record: Mapping[str, Any]) -> None:
        self._root, self._record = root, record
        self.path = root / record["file"]

    @cached_property
    def ids(self) -> np.ndarray:
        return self._map(self._record["file"], DTYPES[self._record["dtype"]])

    @cached_property
    def starts(self) -> np.ndarray:
        return self._map(self._record["index"]["file"], START)

    @cached_property
    def _lines(self) -> np.ndarray:
        return self._map(self._record["origins"]["file"], np.dtype("u1"))

    @cached_property
    def _line_ends(self) -> np.ndarray:
        return np.flatnonzero(self._lines == ord("\n"))

    def line(self, i: int) -> dict[str, Any]:
        begin = int(self._line_ends[i - 1]) + 1 if i else 0
        return json.loads(self._lines[begin : int(self._line_ends[i])].tobytes())

    def _map(self, file: str, dtype: np.dtype) -> np.ndarray:
        return np.asarray(np.memmap(self._root / file, dtype=dtype, mode="r"))


class ShardSet:
    """A folder of prepared data: its manifest, tokenizer and one token stream per split and source."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.sources: tuple[str, ...] = tuple(manifest["splits"]["train"])
        self.tokenizer_path = path / "tokenizer"
        self._streams: dict[tuple[str, str], TokenStream] = {}

    def __repr__(self) -> str:
        return f"ShardSet({str(self.path)!r})"

    def stream(self, split: str, name: str) -> TokenStream:
        """The tokens of source `name` in `split` (`train` or `validation`). Raises DataError for any other."""
        entry = self.manifest["splits"].get(split, {}).get(name)
        if entry is None:
            raise DataError(
                f"{self.path} must hold source {name!r} in split {split!r}; it has the splits {', '.join(SPLITS)} "
                f"with the sources {', '.join(self.sources)}"
            )
        if (split, name) not in self._streams:
            self._streams[split, name] = TokenStream(self.path, entry)
        return self._streams[split, name]


def open_shards(path: str | Path, *, verify: bool = True) -> ShardSet:
    """The prepared data in folder `path`, every file of it checked against the manifest unless `verify` is off.

    A file's digest is computed once per process as long as size and times stay (threads hash in parallel).
    Raises DataError naming every missing or damaged file.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path)
    if verify:
        problems = damaged_files(path, manifest)
        if problems:
            raise DataError(
                f"{path} must be as it was prepared; found {len(problems)} damaged files: "
                + "; ".join(problems)
                + ". Restore them from a copy, or delete the folder and prepare it again (tinylab prepare)"
            )
    return ShardSet(path, manifest)
