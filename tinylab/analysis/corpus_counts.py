"""Counts of prepared data for figures: documents, their lengths, and the frequency of each token id."""

from typing import Any

import numpy as np
import pandas

from tinylab.data.shards.reader import ShardSet

MOST_TOKENS = 4_000_000
"""Tokens counted per source, from the beginning of the stream, where documents are in shuffled order."""


def shard_table(shards: ShardSet, seq_len: int) -> pandas.DataFrame:
    """One row per split and source: documents, tokens, bytes, bytes per token, windows of `seq_len` tokens."""
    rows = []
    for split, entries in shards.manifest["splits"].items():
        for name in entries:
            stream = shards.stream(split, name)
            rows.append(
                {"split": split, "source": name, "documents": stream.n_documents, "tokens": stream.n_tokens}
                | {"bytes": stream.n_bytes, "bytes per token": stream.n_bytes / max(stream.n_tokens, 1)}
                | {"windows per epoch": stream.n_windows(seq_len)}
            )
    return pandas.DataFrame(rows)


def document_lengths(shards: ShardSet, split: str = "train") -> dict[str, np.ndarray]:
    """Length of each document in tokens (boundary ids included), by source, over the first `MOST_TOKENS` tokens."""
    lengths = {}
    for name in shards.sources:
        stream = shards.stream(split, name)
        count = min(stream.n_tokens, MOST_TOKENS)
        ends = [count] if count == stream.n_tokens else []
        lengths[name] = np.diff(np.concatenate([stream.document_starts(0, count), np.array(ends, dtype=np.int64)]))
    return lengths


def sample_table(samples: list[dict[str, Any]]) -> pandas.DataFrame:
    """One row per sample of a step (data/trace.py); its documents are one text, with the origin and tokens of each."""
    rows = []
    for sample in samples:
        documents = "; ".join(f"{d['origin']} ({d['tokens']} tokens)" for d in sample["documents"])
        rows.append({k: sample[k] for k in ("n", "source", "epoch", "window")} | {"documents": documents})
    return pandas.DataFrame(rows)


def token_counts(shards: ShardSet, split: str = "train") -> dict[str, np.ndarray]:
    """How often each id occurs in the first `MOST_TOKENS` tokens of each source: arrays of length vocab_size."""
    size = int(shards.manifest["tokenizer"]["vocab_size"])
    streams = {name: shards.stream(split, name) for name in shards.sources}
    return {n: np.bincount(s.read(0, min(s.n_tokens, MOST_TOKENS)), minlength=size) for n, s in streams.items()}
