"""Counts of prepared data for tables and figures, against documents written by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tinylab.analysis import corpus_counts
from tinylab.data.shards.format import build_manifest, source_entry
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.data.shards.writer import ShardWriter
from tinylab.runs.manifest import commit_folder, temporary_folder

PROSE = [[5, 6, 7, 2], [8, 2], [5, 5, 2]]
CODE = [[9, 2]]


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Two sources of 9 and 2 tokens; nothing of `code` is held out."""
    temporary, splits = temporary_folder(tmp_path / "data"), {"train": {}, "validation": {}}
    for split, sources in (("train", {"prose": PROSE, "code": CODE}), ("validation", {"prose": CODE, "code": []})):
        for name, documents in sources.items():
            writer = ShardWriter(temporary / split / name, 12, shard_tokens=6)
            for ids in documents:
                writer.add(np.array(ids), "x", 3, hashlib.sha256(bytes(ids)).hexdigest())
            splits[split][name] = source_entry(writer.close())
    tokenizer = {"hash": "0", "vocab_size": 12, "bos_id": 1, "eos_id": 2, "boundary": "eos"}
    commit_folder(temporary, tmp_path / "data", build_manifest({}, tokenizer, splits, seed=0, tool="test", report={}))
    return open_shards(tmp_path / "data")


def test_the_table_counts_every_split_and_source_including_an_empty_one(shards):
    table = corpus_counts.shard_table(shards, seq_len=4)
    assert table.values.tolist() == [
        ["train", "prose", 3, 9, 9, 1.0, 2],
        ["train", "code", 1, 2, 3, 1.5, 0],
        ["validation", "prose", 1, 2, 3, 1.5, 0],
        ["validation", "code", 0, 0, 0, 0.0, 0],
    ]


@pytest.mark.parametrize(("most", "expected"), [(100, [4, 2, 3]), (9, [4, 2, 3]), (8, [4, 2]), (5, [4])])
def test_lengths_are_of_documents_complete_within_the_counted_tokens(shards, monkeypatch, most, expected):
    monkeypatch.setattr(corpus_counts, "MOST_TOKENS", most)
    lengths = corpus_counts.document_lengths(shards)
    assert lengths["prose"].tolist() == expected and lengths["code"].tolist() == [2]
    assert corpus_counts.document_lengths(shards, "validation")["code"].tolist() == []


def test_ids_are_counted_over_the_whole_vocabulary(shards, monkeypatch):
    assert corpus_counts.token_counts(shards)["prose"].tolist() == [0, 0, 3, 0, 0, 3, 1, 1, 1, 0, 0, 0]
    assert corpus_counts.token_counts(shards, "validation")["code"].tolist() == [0] * 12
    monkeypatch.setattr(corpus_counts, "MOST_TOKENS", 4)
    assert corpus_counts.token_counts(shards)["prose"].sum() == 4


def test_documents_of_a_sample_are_one_text():
    documents = [{"origin": "a.txt", "tokens": 3}, {"origin": "b.txt", "tokens": 2}]
    sample = {"n": 7, "source": "prose", "epoch": 0, "window": 1, "first_token": 4, "documents": documents}
    (row,) = corpus_counts.sample_table([sample]).to_dict("records")
    assert row == {
        "n": 7,
        "source": "prose",
        "epoch": 0,
        "window": 1,
        "documents": "a.txt (3 tokens); b.txt (2 tokens)",
    }
