"""The content of a data folder: read, deduplicate, hold out, tokenize, store.

    corpus → spool (texts, exact duplicates gone) → split by hash of the text → tokenizer (trained or given) → shards

Nothing stored depends on time, place or the order of a folder's listing.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylab import __version__
from tinylab.config.schema import Data, Source
from tinylab.data.corpus.sources import open_corpus
from tinylab.data.shards.format import DTYPES, SPLITS, build_manifest, dtype_name, source_entry
from tinylab.data.shards.writer import ShardWriter
from tinylab.data.spool import Entry, Spool, sample
from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.data.tokenizer.load import fetch_tokenizer, train_tokenizer
from tinylab.errors import DataError
from tinylab.runs.durable import failpoint

TOKENIZER_SAMPLE_BYTES = 8_000_000
"""Text that a tokenizer is trained on: 4,096 entries take about 2 s on one core."""
CHECKED_DOCUMENTS = 64
"""Documents of each source on which the fast encoder is compared with the reference before it is used."""
BATCH_BYTES = 2_000_000
LINE_BYTES = 220
"""Provenance of one document in its shard, bytes, for the estimate of disk."""

Say = Callable[[str], None]


def build(folder: Path, data: Data, identity: dict[str, Any], say: Say) -> dict[str, Any]:
    """Write shards and tokenizer of `data` below `folder`, and return the manifest with `identity` as its `config`."""
    started = time.monotonic()
    given = None if data.tokenizer == "train" else _given_tokenizer(data)  # before the corpus, which may take hours
    (folder / "spool").mkdir()
    seen: set[bytes] = set()
    spools = [read_source(source, folder / "spool" / source.name, data, seen, say) for source in data.sources]
    tokenizer = given or train_tokenizer(sample(spools, TOKENIZER_SAMPLE_BYTES), data.vocab_size)
    texts = [text for spool in spools for text in spool.texts(spool.train[:CHECKED_DOCUMENTS])]
    tokenizer.check(texts)
    failpoint("prepare.tokenizer")
    say(f"tokenizer {data.tokenizer}: {tokenizer.vocab_size:,} entries, encoded by {tokenizer.backend}")
    for note in tokenizer.notes:
        say(f"tokenizer: {note}")
    boundary = _boundary(tokenizer, data)
    _check_disk(folder, spools, tokenizer, texts, say)
    tokenizer.save(folder / "tokenizer")
    splits: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
    encoded = 0
    for split, sources in splits.items():
        for spool in spools:
            entries = spool.train if split == "train" else spool.validation
            stored, count = write_documents(folder / split / spool.name, spool, entries, tokenizer, boundary)
            sources[spool.name] = stored
            encoded += count
            say(f"{split} {spool.name}: {stored['documents']:,} documents, {stored['tokens']:,} tokens")
    total = {what: sum(e[what] for s in splits.values() for e in s.values()) for what in ("tokens", "documents")}
    say(f"{total['tokens']:,} tokens in {time.monotonic() - started:.1f} s")
    return build_manifest(
        identity,
        {
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "boundary": data.boundary,
        },
        splits,
        seed=data.seed,
        tool=f"tinylab {__version__}",
        report={
            "sources": {spool.name: spool.report for spool in spools},
            "conservation": {
                "tokens_encoded": encoded,
                "boundary_tokens": total["documents"] * sum(map(len, boundary)),
                "tokens_stored": total["tokens"],
            },
        },
    )


def read_source(source: Source, path: Path, data: Data, seen: set[bytes], say: Say) -> Spool:
    """Read a source into a spool at `path`, without the texts whose digests are in `seen`, and split it."""
    spool = Spool(path, source.name)
    skipped: Counter[str] = Counter()
    try:
        documents = open_corpus(source.corpus, skipped)
        spool.fill(documents, seen, skipped, None if source.limit_mb is None else source.limit_mb * 1e6)
    except DataError as error:
        raise DataError(f"source {source.name}: {error}") from error
    failpoint("prepare.read")
    if not spool.report["kept"]:
        raise DataError(
            f"source {source.name} ({source.corpus}) must have at least one document with text that no other source "
            f"has; found {spool.report}. Check data.sources, or remove the source"
        )
    spool.split(data.validation_fraction, data.seed)
    say(f"read {source.name} ({source.corpus}): {spool.n_bytes / 1e6:,.2f} MB of text; {spool.counts()}")
    if not spool.validation:
        say(f"{source.name} has one document: nothing of it is held out for validation")
    return spool


def write_documents(
    folder: Path, spool: Spool, entries: Sequence[Entry], tokenizer: Tokenizer, boundary: tuple[np.ndarray, np.ndarray]
) -> tuple[dict[str, Any], int]:
    """Encode entries and write them as the shards of `folder` (DATA/SPLIT/SOURCE).

    Returns their `source_entry` and the number of ids without those of `boundary`, (before, after) each document.
    """
    before, after = boundary
    writer = ShardWriter(folder, tokenizer.vocab_size)
    encoded = 0
    for batch, texts in spool.batches(entries, BATCH_BYTES):
        for entry, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            encoded += len(ids)
            writer.add(np.concatenate([before, ids, after]), entry.origin, entry.size, entry.digest.hex())
        failpoint("prepare.encoded")
    stored = source_entry(writer.close())
    bounds = len(entries) * (len(before) + len(after))
    assert stored["tokens"] == encoded + bounds, f"{folder}: {encoded} + {bounds} tokens encoded, found {stored}"
    return stored, encoded


def _given_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer that data.tokenizer names. Raises DataError unless it has data.vocab_size entries."""
    tokenizer = fetch_tokenizer(data.tokenizer)
    if tokenizer.vocab_size != data.vocab_size:
        raise DataError(
            f"data.vocab_size ({data.vocab_size}) must equal the entries of data.tokenizer ({data.tokenizer}): "
            f"{tokenizer.vocab_size}; set data.vocab_size and model.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


def _boundary(tokenizer: Tokenizer, data: Data) -> tuple[np.ndarray, np.ndarray]:
    before = [tokenizer.bos_id] if "bos" in data.boundary else []
    after = [tokenizer.eos_id] if "eos" in data.boundary else []
    if None in (*before, *after):
        raise DataError(
            f"data.boundary = {data.boundary!r} must use special tokens that the tokenizer has; "
            f"found bos {tokenizer.bos_id}, eos {tokenizer.eos_id}. Set data.boundary to one it has"
        )
    return np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)


def _check_disk(folder: Path, spools: list[Spool], tokenizer: Tokenizer, texts: list[str], say: Say) -> None:
    """Say what will be stored, estimated on a sample; raise DataError when it does not fit."""
    sample_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    tokens = int(sample_tokens * sum(s.n_bytes for s in spools) / max(sum(len(t.encode()) for t in texts), 1))
    documents = sum(len(s.train) + len(s.validation) for s in spools)
    needed = tokens * DTYPES[dtype_name(tokenizer.vocab_size)].itemsize + documents * LINE_BYTES
    free = shutil.disk_usage(folder).free
    say(
        f"{documents:,} documents, about {tokens:,} tokens: about {needed / 1e6:,.1f} MB of disk needed, "
        f"{free / 1e6:,.0f} MB free"
    )
    if needed > free:
        raise DataError(
            f"{folder.parent} must have room for the shards, about {needed:,} bytes; found {free:,} free. "
            "Make room, choose another folder (data.path), or take less text (limit_mb)"
        )
