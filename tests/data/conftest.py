"""Small prepared data folders, made through the real writer and commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tinylab.data.shards import ShardSet, ShardWriter, build_manifest, open_shards, source_entry
from tinylab.runs.manifest import commit_folder, temporary_folder

Documents = Mapping[str, Sequence[Sequence[int]]]
MakeData = Callable[..., ShardSet]


def _write_data(
    target: Path,
    train: Documents,
    validation: Documents | None = None,
    *,
    vocab_size: int = 100,
    shard_tokens: int = 50,
) -> Path:
    """Commit documents (lists of ids, by source) as a data folder. A document's text is its ids written out."""
    temporary = temporary_folder(target)
    splits = {"train": train, "validation": validation or dict.fromkeys(train, ())}
    entries: dict = {}
    for split, sources in splits.items():
        for name, documents in sources.items():
            writer = ShardWriter(temporary / split / name, vocab_size, shard_tokens)
            for i, ids in enumerate(documents):
                text = " ".join(map(str, ids))
                digest = hashlib.sha256(text.encode()).hexdigest()
                writer.add(np.array(ids), f"{name}:{split}:{i}", len(text), digest)
            entries.setdefault(split, {})[name] = source_entry(writer.close())
    (temporary / "tokenizer").mkdir()
    (temporary / "tokenizer" / "tokenizer.json").write_text("{}")
    tokenizer = {"hash": "0", "vocab_size": vocab_size, "bos_id": 1, "eos_id": 2, "boundary": "eos"}
    manifest = build_manifest({}, tokenizer, entries, seed=0, tool="test", report={})
    commit_folder(temporary, target, manifest)
    return target


@pytest.fixture(scope="session")
def write_data() -> Callable[..., Path]:
    """The function that commits documents as a data folder: write_data(target, {"prose": [[5, 6, 2], …]})."""
    return _write_data


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """A function that writes documents as a data folder and opens it: make_data({"prose": [[5, 6, 2], …]})."""

    def make(train: Documents, validation: Documents | None = None, *, name: str = "data", **sizes: int) -> ShardSet:
        return open_shards(_write_data(tmp_path / name, train, validation, **sizes))

    return make
