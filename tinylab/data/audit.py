"""The checks that TinyLlama's data lacked: padding runs, conservation, duplicates across the splits, ranges of ids."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinylab.data.shards.format import SPLITS
from tinylab.data.shards.reader import ShardSet, TokenStream

_CHUNK = 2**22
"""Tokens looked at at once."""
_STRETCH = 50
"""Equal tokens in a row that count as copied text (Lee et al. 2022, "Deduplicating training data makes language
models better", section 4.1)."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_EXAMPLES = 5
"""Cases of one kind that are named; the rest is counted."""


def audit_shards(shards: ShardSet, *, max_run: int = 64, seq_len: int | None = None) -> dict[str, Any]:
    """What the prepared data hold, and `problems`: one line for each thing that must not be (empty when all is well).

    Problems: `max_run` or more equal ids in a row (TinyLlama stored entire chunks of BOS: jzhang38/TinyLlama#83),
    counts that differ between manifest, ids, index and documents, ids outside the vocabulary or the recorded range,
    documents of the validation split that are also trained on. With `seq_len`, `windows` and `rest_tokens` too:
    tokens = 1 + windows * seq_len + rest, where the rest (less than one sequence) is never a target.
    `copied` is not a problem but worth knowing: the share of each source's validation tokens within a stretch of
    50 tokens which some training source has too, such as the docstring of a function whose source is trained on.
    """
    problems: list[str] = []
    splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    digests: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    repeated = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for name in shards.sources:
            stream = shards.stream(split, name)
            lines = [stream.document_line(i) for i in range(stream.n_documents)]
            entry = _audit_stream(shards, split, name, lines, max_run, problems)
            if seq_len is not None:
                windows = stream.n_windows(seq_len)
                entry |= {"windows": windows, "rest_tokens": max(0, stream.n_tokens - 1 - windows * seq_len)}
            splits[split][name] = entry
            for line in lines:
                repeated[split] += line["sha256"] in digests[split]
                digests[split].setdefault(line["sha256"], line["origin"])
    leaked = sorted(digests["train"].keys() & digests["validation"].keys())
    if leaked:
        origins = ", ".join(digests["validation"][d] for d in leaked[:_EXAMPLES])
        problems.append(f"{len(leaked)} validation documents are also trained on, such as {origins}")
    return {
        "path": str(shards.path),
        "fingerprint": shards.fingerprint,
        "splits": splits,
        "copied": _copied(shards),
        "repeated_documents": {**repeated, "validation_in_train": len(leaked)},
        "problems": problems,
    }


def find_runs(stream: TokenStream) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every stretch of equal ids, joined across shard borders: arrays of (first token, length, id), by position."""
    start, length, held = 0, 0, -1
    for at in range(0, stream.n_tokens, _CHUNK):
        ids = stream.read(at, min(_CHUNK, stream.n_tokens - at)).astype(np.int64)
        first = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1])
        values, starts, lengths = ids[first], at + first, np.diff(first, append=len(ids))
        if values[0] == held:
            starts[0], lengths[0] = start, lengths[0] + length
        elif length:
            yield np.array([start]), np.array([length]), np.array([held])
        start, length, held = int(starts[-1]), int(lengths[-1]), int(values[-1])
        yield starts[:-1], lengths[:-1], values[:-1]
    if length:
        yield np.array([start]), np.array([length]), np.array([held])


def _copied(shards: ShardSet) -> dict[str, float | None]:
    """Share of each source's validation tokens inside a stretch that training has too; None without tokens."""
    held = {name: shards.stream("validation", name) for name in shards.sources}
    hashes = {name: _stretches(stream.read(0, stream.n_tokens)) for name, stream in held.items()}
    known = np.unique(np.concatenate(list(hashes.values())))
    trained = np.zeros(len(known) + 1, dtype=bool)  # one more: the place of a hash beyond all known ones
    for name in shards.sources:
        stream = shards.stream("train", name)
        for at in range(0, stream.n_tokens, _CHUNK):
            found = _stretches(stream.read(at, min(_CHUNK + _STRETCH - 1, stream.n_tokens - at)))
            trained[np.searchsorted(known, found[np.isin(found, known)])] = True
    shares: dict[str, float | None] = {}
    for name, stream in held.items():
        begins = np.zeros(stream.n_tokens + _STRETCH, dtype=np.int64)
        starts = np.flatnonzero(trained[np.searchsorted(known, hashes[name])])
        begins[starts] += 1
        begins[starts + _STRETCH] -= 1
        inside = int((np.cumsum(begins)[: stream.n_tokens] > 0).sum())
        shares[name] = inside / stream.n_tokens if stream.n_tokens else None
    return shares


def _stretches(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each full stretch, by its first token: uint64."""
    count = max(0, len(ids) - _STRETCH + 1)
    state = np.zeros(count, dtype=np.uint64)
    for k in range(_STRETCH):
        state = state * _FACTOR + ids[k : k + count].astype(np.uint64) + np.uint64(1)
    return state


def _audit_stream(
    shards: ShardSet, split: str, name: str, lines: list[dict[str, Any]], max_run: int, problems: list[str]
) -> dict[str, Any]:
    """Counts of one source in one split, measured on its files; what does not hold goes to `problems`."""
    where, stream = f"{split}/{name}", shards.stream(split, name)
    records = shards.manifest["splits"][split][name]["shards"]
    tokens, longest, ids, long_runs = 0, 0, set(), []
    for starts, lengths, values in find_runs(stream):
        tokens += int(lengths.sum())
        if len(values):
            longest = max(longest, int(lengths.max()))
            ids |= {int(values.min()), int(values.max())}
        for i in np.flatnonzero(lengths >= max_run):
            long_runs.append((int(starts[i]), int(lengths[i]), int(values[i])))
    sizes = np.array([line["tokens"] for line in lines], dtype=np.int64)
    index = stream.document_starts(0, stream.n_tokens)
    said_and_found = {
        "tokens": (stream.n_tokens, tokens),
        "tokens of documents": (stream.n_tokens, int(sizes.sum())),
        "documents in the index": (stream.n_documents, len(index)),
        "bytes of text": (stream.n_bytes, sum(line["bytes"] for line in lines)),
        "smallest id": (min((r["min_id"] for r in records), default=None), min(ids, default=None)),
        "largest id": (max((r["max_id"] for r in records), default=None), max(ids, default=None)),
    }
    for what, (said, found) in said_and_found.items():
        if said != found:
            problems.append(f"{where}: {what}: the manifest says {said}, found {found}")
    if not np.array_equal(index, np.cumsum(sizes) - sizes):
        problems.append(f"{where}: the index of document starts differs from the documents' tokens")
    if ids and max(ids) >= shards.vocab_size:
        problems.append(f"{where}: ids must be below {shards.vocab_size}; found {max(ids)}")
    for start, length, value in long_runs[:_EXAMPLES]:
        origin = stream.documents(start, 1)[0].origin
        problems.append(f"{where}: id {value} {length} times in a row at {stream.locate(start)}, document {origin}")
    if len(long_runs) > _EXAMPLES:
        problems.append(f"{where}: {len(long_runs) - _EXAMPLES} more runs of at least {max_run} equal ids")
    return {
        "tokens": stream.n_tokens,
        "documents": stream.n_documents,
        "bytes": stream.n_bytes,
        "shards": len(records),
        "min_id": min(ids, default=None),
        "max_id": max(ids, default=None),
        "longest_run": longest,
        "long_runs": len(long_runs),
    }
