"""Corpora to token shards: read, deduplicate, hold out, tokenize, store, commit.

    corpus → spool (texts, exact duplicates gone) → split by hash of the text → tokenizer (trained or given) → shards

Everything grows in a temporary folder beside the target and appears by one rename, manifest included; the same
command completes what was interrupted. Nothing stored depends on time, place or the order of a folder's listing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinylab import __version__
from tinylab.config.io import run_to_dict
from tinylab.config.schema import Data, Source
from tinylab.data.corpus.files import listing
from tinylab.data.corpus.sources import open_corpus
from tinylab.data.shards.format import DTYPES, build_manifest, dtype_name, source_entry
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.data.shards.writer import ShardWriter
from tinylab.data.spool import Spool, sample
from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.data.tokenizer.load import fetch_tokenizer, train_tokenizer
from tinylab.errors import CheckpointError, DataError
from tinylab.runs.durable import disk_error, failpoint
from tinylab.runs.folder import home
from tinylab.runs.manifest import MANIFEST, commit_folder, temporary_folder

TOKENIZER_SAMPLE_BYTES = 8_000_000
"""Text that a tokenizer is trained on: 4,096 entries take about 2 s on one core."""
CHECKED_DOCUMENTS = 64
"""Documents of each source on which the fast encoder is compared with the reference before it is used."""
BATCH_BYTES = 2_000_000
LINE_BYTES = 220
"""Provenance of one document in its shard, bytes, for the estimate of disk."""
_NOT_IN_SHARDS = ("path", "document_mask")

Say = Callable[[str], None]


def data_path(data: Data) -> Path:
    """Folder of the shards of a data section: `data.path`, else TINYLAB_HOME/data/<digest of what decides them>."""
    if data.path:
        return Path(data.path).expanduser().absolute()
    text = json.dumps(_identity(data), sort_keys=True)
    return home() / "data" / hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(data: Data, *, path: Path | None = None, progress: Say | None = None) -> ShardSet:
    """The shards of a data section in `path` (default: `data_path(data)`), prepared now if they are not there yet.

    Two callers at once: the second waits and finds them done. Shards stay as they are when the files of a source
    change, since a run must be able to go on; a line says so. `progress` receives lines of text (default: standard
    error). Raises DataError: a missing, empty or unreadable corpus (source and file named), a tokenizer of another
    size than data.vocab_size, other data in the folder, no permission, not enough disk. Then nothing is left behind.
    """
    target = (path or data_path(data)).absolute()
    say = progress or (lambda line: print(f"prepare: {line}", file=sys.stderr, flush=True))
    shards = _prepared(target, data)
    if shards is not None:
        _say_what_changed(shards, data, say)
        return shards
    with _locked(target, say):
        shards = _prepared(target, data)
        if shards is not None:
            return shards
        folder = target
        try:
            folder = temporary_folder(target)
            manifest = _fill(folder, data, say)
            shutil.rmtree(folder / "spool")
            failpoint("prepare.filled")
            if target.exists():
                target.rmdir()  # empty, see _prepared
            commit_folder(folder, target, extra=manifest)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise DataError(str(disk_error(folder, error))) from error
        finally:
            if folder != target:
                shutil.rmtree(folder, ignore_errors=True)
    return open_shards(target)


def _identity(data: Data) -> dict[str, Any]:
    """The data section without what does not change the shards."""
    return {k: v for k, v in run_to_dict(data).items() if k not in _NOT_IN_SHARDS}


def _prepared(target: Path, data: Data) -> ShardSet | None:
    """The shards in `target` if they are those of `data`; None if there is nothing yet.

    Raises DataError when the folder holds something else.
    """
    try:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
    except OSError as error:
        raise DataError(str(disk_error(target, error))) from error
    if not (target / MANIFEST).exists():
        raise DataError(
            f"{target} must be empty or hold prepared data; found other files and no {MANIFEST}. "
            "Give another folder (data.path)"
        )
    shards = open_shards(target)
    found, wanted = shards.manifest["config"], _identity(data)
    if found != wanted:
        keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
        differences = "; ".join(f"data.{k} is {found.get(k)!r} there, {wanted.get(k)!r} here" for k in sorted(keys))
        raise DataError(
            f"{target} must hold the data of this configuration; {differences}. "
            "Give another folder (data.path), leave it out, or delete this one"
        )
    return shards


def _listings(data: Data) -> dict[str, dict[str, Any]]:
    """The local files behind each source and the tokenizer, as `corpora.listing` gives them."""
    places = {"tokenizer": data.tokenizer} if data.tokenizer != "train" else {}
    for source in data.sources:
        kind, _, rest = source.corpus.partition(":")
        if kind != "local":
            places[f"source {source.name}"] = rest.partition(":")[0] if kind == "hf" else rest
    return {f"{what} ({place})": found for what, place in places.items() if (found := listing(place))}


def _say_what_changed(shards: ShardSet, data: Data, say: Say) -> None:
    """Say what other files are there now than when `shards` were prepared; gone files are no change."""
    now = _listings(data)
    for what, before in shards.manifest.get("listings", {}).items():
        if now.get(what, before) != before:
            say(
                f"{shards.path} is used as it was prepared, but {what} has changed: {before['files']:,} files then, "
                f"{now[what]['files']:,} now, of other names or sizes. "
                "To prepare it again, delete the folder or give another (data.path)"
            )


@contextmanager
def _locked(target: Path, say: Say) -> Iterator[None]:
    """Hold the lock of `target`, a file beside it that goes with its holder; waits for another preparation."""
    path = target.with_name(f".lock-{target.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process prepares {target}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                break
            os.close(descriptor)  # its holder ended and took the file away: take part in the next one
    except OSError as error:
        raise DataError(str(disk_error(path, error))) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _fill(folder: Path, data: Data, say: Say) -> dict[str, Any]:
    """Write shards and tokenizer of `data` below `folder`; gives the manifest."""
    started = time.monotonic()
    listings = _listings(data)
    given = None if data.tokenizer == "train" else _given_tokenizer(data)  # before the corpus, which may take hours
    spools = _read_sources(folder / "spool", data, say)
    tokenizer = given or _train_tokenizer(data, spools)
    _check_tokenizer(tokenizer, data, spools, say)
    boundary = _boundary(tokenizer, data)
    _check_disk(folder, spools, tokenizer, say)
    tokenizer.save(folder / "tokenizer")
    splits: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "validation": {}}
    encoded = documents = 0
    for split, sources in splits.items():
        for spool in spools:
            writer = ShardWriter(folder / split / spool.name, tokenizer.vocab_size)
            entries = spool.train if split == "train" else spool.validation
            n_tokens = 0
            for batch, texts in spool.batches(entries, BATCH_BYTES):
                for entry, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    n_tokens += len(ids)
                    whole = np.concatenate([boundary[0], ids, boundary[1]])
                    writer.add(whole, entry.origin, entry.size, entry.digest.hex())
                failpoint("prepare.encoded")
            sources[spool.name] = source_entry(writer.close())
            stored, bounds = sources[spool.name]["tokens"], sum(map(len, boundary)) * len(entries)
            assert stored == n_tokens + bounds, f"{spool.name}: {n_tokens} + {bounds} tokens encoded, {stored} stored"
            encoded, documents = encoded + n_tokens, documents + len(entries)
            say(f"{split} {spool.name}: {len(entries):,} documents, {stored:,} tokens")
    stored = sum(e["tokens"] for sources in splits.values() for e in sources.values())
    say(f"{stored:,} tokens in {time.monotonic() - started:.1f} s")
    manifest = build_manifest(
        _identity(data),
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
                "boundary_tokens": documents * sum(map(len, boundary)),
                "tokens_stored": stored,
            },
        },
    )
    return {**manifest, "listings": listings}


def _read_sources(folder: Path, data: Data, say: Say) -> list[Spool]:
    """Every source in a spool of its own, split into training and validation."""
    folder.mkdir()
    seen: set[bytes] = set()
    spools = []
    for source in data.sources:
        spool = _read_source(Spool(folder / source.name, source.name), source, seen)
        spool.split(data.validation_fraction, data.seed)
        say(f"read {source.name} ({source.corpus}): {spool.n_bytes / 1e6:,.2f} MB of text; {spool.counts()}")
        if not spool.validation:
            say(f"{source.name} has one document: nothing of it is held out for validation")
        spools.append(spool)
    return spools


def _read_source(spool: Spool, source: Source, seen: set[bytes]) -> Spool:
    skipped: Counter[str] = Counter()
    try:
        documents = open_corpus(source.corpus, skipped)
        spool.fill(documents, seen, skipped, None if source.limit_mb is None else source.limit_mb * 1e6)
    except DataError as error:
        raise DataError(f"source {source.name}: {error}") from error
    failpoint("prepare.read")
    if not spool.report["kept"]:
        raise DataError(
            f"source {source.name} ({source.corpus}) must give at least one document with text that no other has; "
            f"found {spool.report}. Check data.sources, or take the source out"
        )
    return spool


def _given_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer that data.tokenizer names. Raises DataError unless it has data.vocab_size entries."""
    tokenizer = fetch_tokenizer(data.tokenizer)
    if tokenizer.vocab_size != data.vocab_size:
        raise DataError(
            f"data.vocab_size ({data.vocab_size}) must equal the entries of data.tokenizer ({data.tokenizer}): "
            f"{tokenizer.vocab_size}; set data.vocab_size and model.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


def _train_tokenizer(data: Data, spools: list[Spool]) -> Tokenizer:
    """A tokenizer of data.vocab_size entries from a sample of the sources."""
    chosen = sample(spools, TOKENIZER_SAMPLE_BYTES)
    return train_tokenizer((text for spool, entries in chosen for text in spool.texts(entries)), data.vocab_size)


def _check_tokenizer(tokenizer: Tokenizer, data: Data, spools: list[Spool], say: Say) -> None:
    """Compare a tokenizer with its reference on the first documents, and say what it is."""
    tokenizer.check([text for spool in spools for text in spool.texts(spool.train[:CHECKED_DOCUMENTS])])
    failpoint("prepare.tokenizer")
    say(f"tokenizer {data.tokenizer}: {tokenizer.vocab_size:,} entries, encoded by {tokenizer.backend}")
    for note in tokenizer.notes:
        say(f"tokenizer: {note}")


def _boundary(tokenizer: Tokenizer, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Ids before and after each document."""
    before = [tokenizer.bos_id] if "bos" in data.boundary else []
    after = [tokenizer.eos_id] if "eos" in data.boundary else []
    if None in (*before, *after):
        raise DataError(
            f"data.boundary = {data.boundary!r} must use special tokens that the tokenizer has; "
            f"found bos {tokenizer.bos_id}, eos {tokenizer.eos_id}. Set data.boundary to one it has"
        )
    return np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)


def _check_disk(folder: Path, spools: list[Spool], tokenizer: Tokenizer, say: Say) -> None:
    """Say what will be stored, estimated on a sample; raise DataError when it does not fit."""
    texts = [text for spool in spools for text in spool.texts(spool.train[:CHECKED_DOCUMENTS])]
    sample_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    tokens = int(sample_tokens * sum(s.n_bytes for s in spools) / max(sum(len(t.encode()) for t in texts), 1))
    documents = sum(len(s.train) + len(s.validation) for s in spools)
    itemsize = DTYPES[dtype_name(tokenizer.vocab_size)].itemsize
    needed = tokens * itemsize + documents * LINE_BYTES
    free = shutil.disk_usage(folder).free
    say(
        f"{documents:,} documents, about {tokens:,} tokens: about {needed / 1e6:,.1f} MB of disk needed, "
        f"{free / 1e6:,.0f} MB free"
    )
    if needed > free:
        raise DataError(
            f"{folder.parent} must have room for the shards, about {needed:,} bytes; found {free:,} free. "
            "Make room, give another folder (data.path), or take less (limit_mb)"
        )
