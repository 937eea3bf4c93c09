"""Prepared data, read: memory-mapped token streams with document boundaries.

No byte of a shard is returned before this process has compared its file with its SHA-256 (integrity.py).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinylab.data.shards.format import DTYPES, SPLITS, START
from tinylab.data.shards.integrity import read_manifest, require_complete, require_intact
from tinylab.errors import DataError


@dataclass(frozen=True)
class DocumentSpan:
    """The part of one document that is in a range of tokens."""

    origin: str
    """Where the document came from, e.g. `stdlib:json/decoder.py`."""
    sha256: str
    """Digest of the document's full text."""
    start: int
    """First token of the part, relative to the range."""
    stop: int
    """One past its last token, relative to the range."""
    document: int
    """Number of the document in the stream."""


class TokenStream:
    """The tokens of one source in one split: the concatenation of its shards, read on demand.

    All methods that read raise DataError naming the file when a shard is damaged.
    """

    def __init__(self, root: Path, entry: Mapping[str, Any]) -> None:
        records = entry["shards"]
        self.n_tokens: int = entry["tokens"]
        self.n_documents: int = entry["documents"]
        self.n_bytes: int = entry["bytes"]
        self._shards = [Shard(root, record) for record in records]
        self._dtype = DTYPES[records[0]["dtype"] if records else "uint16"]
        # Position of each shard's first token and number of its first document in the stream; the totals come last.
        self._tokens = np.cumsum([0, *(r["tokens"] for r in records)], dtype=np.int64)
        self._documents = np.cumsum([0, *(r["documents"] for r in records)], dtype=np.int64)

    def n_windows(self, seq_len: int) -> int:
        """Samples of `seq_len` inputs and targets: windows overlap by one token, the rest of 1…seq_len is left."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, across shard borders, in the stored type."""
        return self.read_many(np.array([start], dtype=np.int64), count)[0]

    def read_many(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Tokens [s, s + count) for each s of `starts`: (len(starts), count) in the stored type."""
        if len(starts) and (count < 0 or starts.min() < 0 or int(starts.max()) + count > self.n_tokens):
            raise IndexError(f"range outside the stream's {self.n_tokens} tokens")
        out = np.empty((len(starts), count), dtype=self._dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            number, filled = self._shard_at(start), 0
            while filled < count:
                begin = start + filled - int(self._tokens[number])
                part = self._shards[number].ids[begin : begin + count - filled]
                row[filled : filled + len(part)] = part
                number, filled = number + 1, filled + len(part)
        return out

    def shards_of(self, starts: np.ndarray, count: int) -> list[Shard]:
        """The shards that hold tokens [s, s + count) for each s of `starts`, in the order of their first use."""
        first = np.searchsorted(self._tokens, starts, side="right") - 1
        last = np.searchsorted(self._tokens, starts + count - 1, side="right") - 1
        numbers = dict.fromkeys(n for a, b in zip(first, last, strict=True) for n in range(a, b + 1))
        return [self._shards[n] for n in numbers]

    def locate(self, position: int) -> str:
        """The file and the token in it at a position of the stream, for messages."""
        number = self._shard_at(position)
        return f"{self._shards[number].path}, token {position - self._tokens[number]}"

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Positions in [start, start + count), relative to `start`, at which a document begins: int64, ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for number in range(self._shard_at(start), len(self._shards)):
            offset = start - int(self._tokens[number])
            if offset + count <= 0:
                break
            starts = self._shards[number].starts
            low, high = np.searchsorted(starts, [offset, offset + count], side="left")
            found.append(starts[low:high] - offset)
        return np.concatenate(found)

    def documents(self, start: int, count: int) -> list[DocumentSpan]:
        """The documents that tokens [start, start + count) belong to, in order."""
        if count <= 0 or not self.n_documents:
            return []
        spans = []
        for i in range(self._document_at_or_after(start + 1) - 1, self._document_at_or_after(start + count)):
            begin, end = self._document_start(i), self._document_start(i + 1)
            line = self.document_line(i)
            low, high = max(begin, start) - start, min(end, start + count) - start
            spans.append(DocumentSpan(line["origin"], line["sha256"], low, high, i))
        return spans

    def document_text_ids(self, i: int) -> np.ndarray:
        """Ids of document `i`, boundary ids included."""
        begin = self._document_start(i)
        return self.read(begin, self._document_start(i + 1) - begin)

    def document_line(self, i: int) -> dict[str, Any]:
        """What is stored about document `i`: origin, bytes and sha256 of its text, tokens."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} outside the stream's {self.n_documents} documents")
        number = int(np.searchsorted(self._documents, i, side="right")) - 1
        return self._shards[number].line(i - int(self._documents[number]))

    def _shard_at(self, position: int) -> int:
        """Number of the shard that holds the token at `position`; past the last one, the number of shards."""
        return int(np.searchsorted(self._tokens, position, side="right")) - 1

    def _document_start(self, i: int) -> int:
        """Position of the first token of document `i`; the stream's length for the one past the last."""
        if i >= self.n_documents:
            return self.n_tokens
        number = int(np.searchsorted(self._documents, i, side="right")) - 1
        return int(self._tokens[number] + self._shards[number].starts[i - self._documents[number]])

    def _document_at_or_after(self, position: int) -> int:
        """Number of the first document that begins at `position` or later."""
        if position >= self.n_tokens:
            return self.n_documents
        number = self._shard_at(position)
        inside = np.searchsorted(self._shards[number].starts, position - self._tokens[number], side="left")
        return int(self._documents[number] + inside)


class Shard:
    """One shard's files as memory maps, each compared with its SHA-256 when it is first asked for, by any thread."""

    def __init__(self, root: Path, record: Mapping[str, Any]) -> None:
        self.path = root / record["file"]
        self._root, self._record = root, record
        self._maps: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def ids(self) -> np.ndarray:
        """Its tokens, in the stored type. Raises DataError when the file is damaged."""
        return self._map(self._record, DTYPES[self._record["dtype"]])

    @property
    def starts(self) -> np.ndarray:
        """Position of each document's first token in the shard: int64. Raises DataError when the file is damaged."""
        return self._map(self._record["index"], START)

    @cached_property
    def _line_ends(self) -> np.ndarray:
        return np.flatnonzero(self._lines == ord("\n"))

    @property
    def _lines(self) -> np.ndarray:
        return self._map(self._record["origins"], np.dtype("u1"))

    def line(self, i: int) -> dict[str, Any]:
        """What is stored about the shard's document `i`. Raises DataError when the file is damaged."""
        begin = int(self._line_ends[i - 1]) + 1 if i else 0
        return json.loads(self._lines[begin : int(self._line_ends[i])].tobytes())

    def verify(self, *, index: bool) -> None:
        """Compare the file of ids, and with `index` that of document starts, unless it is done: ahead of their use."""
        _ = self.ids
        if index:
            _ = self.starts

    def _map(self, entry: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
        file = entry["file"]
        with self._lock:  # whoever needs a file that another thread compares waits for it
            if file not in self._maps:
                require_intact(self._root, entry)
                self._maps[file] = np.asarray(np.memmap(self._root / file, dtype=dtype, mode="r"))
            return self._maps[file]


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


def open_shards(path: str | Path) -> ShardSet:
    """The prepared data in folder `path`, opened in a time that does not depend on their size.

    The manifest, the tokenizer and the presence and size of every file are checked now, a shard's SHA-256 when it is
    first read (`verify_shards` compares all). Raises DataError naming every missing or damaged file found.
    """
    path = Path(path).absolute()
    manifest = read_manifest(path)
    require_complete(path, manifest)
    return ShardSet(path, manifest)
