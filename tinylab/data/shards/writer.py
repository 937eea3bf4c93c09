"""Documents to token shards, in the format of format.py."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylab.data.shards.format import DTYPES, SHARD_TOKENS, START, dtype_name
from tinylab.errors import DataError


class ShardWriter:
    """Writes one source of one split, shard after shard, into `folder` (DATA/SPLIT/SOURCE), made when needed.

    Raises DataError for a document with an id outside the vocabulary or without any id; nothing of it is stored.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self._dtype = dtype_name(vocab_size)
        self._records: list[dict[str, Any]] = []
        self._documents: list[tuple[np.ndarray, dict[str, Any]]] = []
        self._tokens = 0

    def add(self, ids: np.ndarray, origin: str, n_bytes: int, sha256: str) -> None:
        """Append one document: its ids (boundary ids included), where it came from, size and digest of its text."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or not len(ids):
            raise DataError(f"document {origin} must have at least one token in one dimension; found shape {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"document {origin}: token ids must be between 0 and {self.vocab_size - 1}; found {low} to {high}. "
                "The tokenizer and the vocabulary size do not belong together"
            )
        if self._documents and self._tokens + len(ids) > self.shard_tokens:
            self._finish()
        line = {"origin": origin, "bytes": n_bytes, "sha256": sha256, "tokens": len(ids)}
        self._documents.append((ids.astype(DTYPES[self._dtype]), line))
        self._tokens += len(ids)

    def close(self) -> list[dict[str, Any]]:
        """Write the last shard. Returns one record per shard: files relative to DATA, bytes, SHA-256, counts, ids."""
        if self._documents:
            self._finish()
        return self._records

    def _finish(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = write_shard(self.folder / f"{len(self._records):05d}.bin", self._documents)
        self._records.append({"dtype": self._dtype, **record})
        self._documents, self._tokens = [], 0


def write_shard(path: Path, documents: Sequence[tuple[np.ndarray, dict[str, Any]]]) -> dict[str, Any]:
    """Write the three files of a shard, `path` (DATA/SPLIT/SOURCE/NNNNN.bin) and two beside it; returns its record.

    `documents` are ids in the stored type with their lines of provenance.
    """
    ids = np.concatenate([ids for ids, _ in documents])
    starts = np.cumsum([0, *(len(ids) for ids, _ in documents[:-1])], dtype=START)
    lines = "".join(json.dumps(line) + "\n" for _, line in documents).encode()

    def write(path: Path, data: bytes) -> dict[str, Any]:
        path.write_bytes(data)
        file = path.relative_to(path.parents[2]).as_posix()
        return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    return {
        **write(path, ids.tobytes()),
        "tokens": len(ids),
        "documents": len(documents),
        "text_bytes": sum(line["bytes"] for _, line in documents),
        "min_id": int(ids.min()),
        "max_id": int(ids.max()),
        "index": write(path.with_suffix(".idx"), starts.tobytes()),
        "origins": write(path.with_suffix(".docs.jsonl"), lines),
    }
