"""The documents of one source on their way to shards: texts in a file, what is known about them in memory.

A corpus is read once; the split, the tokenizer's sample and the order of documents are decided when all are known.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.data.corpus.document import Document
from tinylab.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """One document: digest of its text, provenance, and the place of its UTF-8 bytes in the spool."""

    digest: bytes
    origin: str
    start: int
    size: int


class Spool:
    """The documents of source `name`, in file `path`, without empty ones and exact duplicates.

    After `fill`: `train` and `validation` hold the entries, in the order in which they are stored; `report` the counts.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.train: list[Entry] = []
        self.validation: list[Entry] = []
        self.report: dict[str, Any] = {}
        self.n_bytes = 0

    def fill(
        self, documents: Iterable[Document], seen: set[bytes], skipped: Counter[str], limit_bytes: float | None
    ) -> None:
        """Take documents until they end or hold `limit_bytes` of text.

        `seen` holds the digests of all texts taken so far, of any source: a text is kept once. The document that
        would pass the limit is cut there, at the end of a line if it has one.
        """
        counts: Counter[str] = Counter()
        entries: list[Entry] = []
        with open(self.path, "wb") as file:
            for document in documents:
                counts["read"] += 1
                data = _encode(document, counts)
                full = hashlib.sha256(data).digest()
                if not data.strip():
                    counts["empty"] += 1
                    continue
                if full in seen:  # checked before any cut: a part of a stored text would count as new
                    counts["duplicates"] += 1
                    continue
                room = len(data) + 1 if limit_bytes is None else int(limit_bytes) - self.n_bytes
                part = _cut(data, room)
                digest = full if part is data else hashlib.sha256(part).digest()
                if part.strip() and digest not in seen:
                    entries.append(Entry(digest, document.origin, self.n_bytes, len(part)))
                    file.write(part)
                    self.n_bytes += len(part)
                seen |= {full, digest}
                if len(data) >= room:
                    break
        self._entries = entries
        self.report = {key: counts[key] for key in ("read", "empty", "duplicates", "repaired")}
        self.report |= {"kept": len(entries), "skipped": dict(sorted(skipped.items()))}

    def counts(self) -> str:
        """What was kept and left out, in words."""
        left_out = {k: self.report[k] for k in ("duplicates", "empty")} | self.report["skipped"]
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items() if n)
        return f"{self.report['kept']:,} of {self.report['read']:,} documents kept; left out: {reasons or 'nothing'}"

    def split(self, fraction: float, seed: int) -> None:
        """Hold out the documents whose keyed hash is below `fraction`; at least one of two, never the only one.

        The hash is of the text, so a document is held out or not whatever else the corpus holds, but for that rule.
        Documents are stored in the order of the hash, which depends on nothing else.
        """
        key = str(seed).encode()[:64]
        rank = {e.digest: hashlib.blake2b(e.digest, key=key, digest_size=8).digest() for e in self._entries}
        entries = sorted(self._entries, key=lambda e: (rank[e.digest], e.digest))
        below = sum(int.from_bytes(r, "big") < fraction * 2**64 for r in rank.values())
        held = min(max(below, 1), len(entries) - 1) if entries else 0
        self.validation, self.train, self._entries = entries[:held], entries[held:], []

    def texts(self, entries: Iterable[Entry]) -> Iterator[str]:
        """The texts of entries. Raises DataError when the spool's file was cut."""
        with open(self.path, "rb") as file:
            for entry in entries:
                file.seek(entry.start)
                data = file.read(entry.size)
                if len(data) != entry.size:
                    raise DataError(
                        f"{self.path} must hold the text of {entry.origin}; found the file cut short. "
                        "Prepare the data again and leave its temporary folder alone"
                    )
                yield data.decode()

    def batches(self, entries: Sequence[Entry], batch_bytes: int) -> Iterator[tuple[list[Entry], list[str]]]:
        """Entries with their texts, about `batch_bytes` at a time."""
        batch: list[Entry] = []
        texts: list[str] = []
        size = 0
        for entry, text in zip(entries, self.texts(entries), strict=True):
            batch.append(entry)
            texts.append(text)
            size += entry.size
            if size >= batch_bytes:
                yield batch, texts
                batch, texts, size = [], [], 0
        if batch:
            yield batch, texts


def sample(spools: list[Spool], n_bytes: int) -> Iterator[str]:
    """Texts to train on of at most about `n_bytes`, in equal parts of each source as far as it has them."""
    chosen: dict[str, list[Entry]] = {}
    left = n_bytes
    by_size = sorted(spools, key=lambda s: sum(e.size for e in s.train))
    for i, spool in enumerate(by_size):
        share, taken, entries = left // (len(by_size) - i), 0, []
        for entry in spool.train:
            if taken >= share:
                break
            entries.append(entry)
            taken += entry.size
        chosen[spool.name] = entries
        left -= taken
    return (text for spool in spools for text in spool.texts(chosen[spool.name]))


def _cut(data: bytes, size: int) -> bytes:
    """The first `size` bytes of a text, less a broken character and what follows the last line end."""
    if len(data) <= size:
        return data
    data = data[:size]
    return data[: data.rfind(b"\n") + 1] or data.decode("utf-8", "ignore").encode()


def _encode(document: Document, counts: Counter[str]) -> bytes:
    """UTF-8 of a text; a lone surrogate (half a character, possible in JSON) becomes a question mark, counted."""
    try:
        return document.text.encode()
    except UnicodeEncodeError:
        counts["repaired"] += 1
        return document.text.encode("utf-8", "replace")
