"""What prepared data look like on disk, and the writer of token shards.

    DATA/manifest.json              what was prepared, from what, with which tokenizer; digests of files; fingerprint
    DATA/tokenizer/                 a Hugging Face tokenizer folder
    DATA/SPLIT/SOURCE/00000.bin     ids, uint16 (vocabularies up to 65,536) or uint32, little endian
    DATA/SPLIT/SOURCE/00000.idx     start of each document in the shard, int64 little endian
    DATA/SPLIT/SOURCE/00000.docs.jsonl   per document: origin, bytes and sha256 of its text, tokens

A source's stream is the concatenation of its shards. No padding is stored; documents never cross a shard, windows may.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from tinylab.errors import DataError
from tinylab.runs.durable import disk_error

VERSION = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26
"""Tokens of a full shard: 128 MiB as uint16."""
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
START = np.dtype("<i8")
_NOT_IDENTITY = ("fingerprint", "files", "listings")
"""Keys of a manifest that the same texts may give otherwise: `listings` is of files, which may be packed anew."""


def dtype_name(vocab_size: int) -> str:
    """The smallest stored type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over a data manifest but for the keys of `_NOT_IDENTITY`: the identity of the prepared data."""
    rest = {k: v for k, v in manifest.items() if k not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def build_manifest(
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    splits: dict[str, dict[str, dict[str, Any]]],
    *,
    seed: int,
    tool: str,
    report: dict[str, Any],
) -> dict[str, Any]:
    """The data manifest, with its fingerprint; `commit_folder(temporary, target, extra=…)` adds `files` and writes it.

    `splits[split][source]` is a `source_entry`. Nothing given may depend on time or machine, or the fingerprint does.
    """
    manifest = {
        "version": VERSION,
        "config": config,
        "tokenizer": tokenizer,
        "seed": seed,
        "tool": tool,
        "splits": splits,
        "report": report,
    }
    return {**manifest, "fingerprint": fingerprint_of(manifest)}


def source_entry(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A source's entry in one split: tokens, documents, UTF-8 bytes of text, and the records of `ShardWriter.close`."""
    return {
        "tokens": sum(r["tokens"] for r in records),
        "documents": sum(r["documents"] for r in records),
        "bytes": sum(r["text_bytes"] for r in records),
        "shards": list(records),
    }


class ShardWriter:
    """Writes one source of one split, shard after shard, into `folder` (DATA/SPLIT/SOURCE).

    Raises DataError, before anything of the document is written, for an id outside the vocabulary or no id at all.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self._root = folder.parent.parent
        self._dtype = dtype_name(vocab_size)
        self._records: list[dict[str, Any]] = []
        self._open: _OpenShard | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(str(disk_error(folder, error))) from error

    def add(self, ids: np.ndarray, origin: str, n_bytes: int, sha256: str) -> None:
        """Append one document: its ids (boundary ids included), where it came from, size and digest of its text."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or not len(ids):
            raise DataError(f"document {origin} must have at least one token in one dimension; found shape {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"document {origin}: token ids must lie between 0 and {self.vocab_size - 1}; found {low} to {high}. "
                "The tokenizer and the vocabulary size do not belong together"
            )
        line = {"origin": origin, "bytes": n_bytes, "sha256": sha256, "tokens": len(ids)}
        try:
            if self._open and self._open.tokens + len(ids) > self.shard_tokens:
                self._finish()
            if self._open is None:
                self._open = _OpenShard(self.folder / f"{len(self._records):05d}.bin")
            self._open.add(ids.astype(DTYPES[self._dtype]).tobytes(), line, low, high)
        except OSError as error:
            raise DataError(str(disk_error(self.folder, error, 2 * len(ids)))) from error

    def close(self) -> list[dict[str, Any]]:
        """End the last shard. Gives one record per shard: files relative to DATA, bytes, SHA-256, counts, ids."""
        try:
            self._finish()
        except OSError as error:
            raise DataError(str(disk_error(self.folder, error))) from error
        return self._records

    def _finish(self) -> None:
        if self._open is not None:
            self._records.append({"dtype": self._dtype, **self._open.close(self._root)})
            self._open = None


class _OpenShard:
    """The three files of the shard being written, hashed as they grow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = self.text_bytes = self.max_id = 0
        self.min_id: int | None = None
        self.starts: list[int] = []
        self.ids_hash, self.lines_hash = hashlib.sha256(), hashlib.sha256()
        self.ids: BinaryIO = open(path, "wb")
        self.lines: TextIO = open(path.with_suffix(".docs.jsonl"), "w", encoding="utf-8", newline="\n")

    def add(self, data: bytes, line: dict[str, Any], low: int, high: int) -> None:
        text = json.dumps(line) + "\n"
        self.ids.write(data)
        self.lines.write(text)
        self.ids_hash.update(data)
        self.lines_hash.update(text.encode())
        self.starts.append(self.tokens)
        self.tokens += line["tokens"]
        self.text_bytes += line["bytes"]
        self.min_id = low if self.min_id is None else min(self.min_id, low)
        self.max_id = max(self.max_id, high)

    def close(self, root: Path) -> dict[str, Any]:
        starts = np.array(self.starts, dtype=START).tobytes()
        index, lines = self.path.with_suffix(".idx"), self.path.with_suffix(".docs.jsonl")
        index.write_bytes(starts)
        self.ids.close()
        self.lines.close()

        def entry(path: Path, sha256: str) -> dict[str, Any]:
            return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": sha256}

        return {
            **entry(self.path, self.ids_hash.hexdigest()),
            "tokens": self.tokens,
            "documents": len(self.starts),
            "text_bytes": self.text_bytes,
            "min_id": self.min_id,
            "max_id": self.max_id,
            "index": entry(index, hashlib.sha256(starts).hexdigest()),
            "origins": entry(lines, self.lines_hash.hexdigest()),
        }
