"""Small prepared data folders, made through the real writer and commit; small sources to prepare; tokenizers."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tinylab.config.schema import Data, Source
from tinylab.data.shards.format import build_manifest, source_entry
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.data.shards.writer import ShardWriter
from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.data.tokenizer.load import train_tokenizer
from tinylab.runs.manifest import commit_folder, temporary_folder

from . import reference_ids
from .paragraphs import LIBRARY, PARAGRAPHS, VOCAB

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


@pytest.fixture
def source_texts(tmp_path: Path) -> dict[str, list[str]]:
    """Two sources: `a` of text files, `b` of JSON lines, with duplicates in and between them, and empty ones."""
    a = [*PARAGRAPHS[:120], PARAGRAPHS[3], PARAGRAPHS[7], "", " \n"]
    b = [*PARAGRAPHS[100:260], PARAGRAPHS[200]]
    (tmp_path / "a").mkdir()
    for i, text in enumerate(a):
        (tmp_path / "a" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in b), encoding="utf-8")
    return {"a": a, "b": b}


@pytest.fixture
def data(tmp_path: Path, source_texts) -> Data:
    sources = (
        Source(name="a", corpus=f"files:{tmp_path}/a/*.txt"),
        Source(name="b", corpus=f"files:{tmp_path}/b.jsonl"),
    )
    return Data(sources=sources, vocab_size=VOCAB, validation_fraction=0.05)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(PARAGRAPHS, VOCAB).save(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 600 kB of the standard library's sources."""
    names = (
        "argparse.py",
        "ast.py",
        "datetime.py",
        "inspect.py",
        "json/decoder.py",
        "logging/__init__.py",
        "typing.py",
    )
    return [(LIBRARY / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, reference_ids.VOCAB)


@pytest.fixture(scope="session")
def sp_model(texts: list[str]) -> bytes:
    """A BPE model from SentencePiece's own trainer, byte fallback as in Llama's file, ids in the order of scores."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=reference_ids.VOCAB,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return model.getvalue()
