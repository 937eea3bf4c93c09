"""Shards return exactly the documents that were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylab.data.shards.writer import ShardWriter
from tinylab.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2], [14, 2], [2]]  # 15 tokens
FLAT = [5, 6, 7, 2, 8, 2, 9, 10, 11, 12, 13, 2, 14, 2, 2]
STARTS = [0, 4, 6, 12, 14]


@pytest.mark.parametrize("shard_tokens", [1, 6, 8, 50])
def test_stream_is_the_concatenation_of_documents_across_shard_borders(make_data, shard_tokens):
    stream = make_data({"a": DOCUMENTS}, shard_tokens=shard_tokens).stream("train", "a")
    assert (stream.n_tokens, stream.n_documents) == (15, 5)
    for start in range(16):
        for count in range(16 - start):
            assert stream.read(start, count).tolist() == FLAT[start : start + count]
            expected = [s - start for s in STARTS if start <= s < start + count]
            assert stream.document_starts(start, count).tolist() == expected


def test_windows_are_counted_so_that_every_token_but_the_first_is_predicted_once(make_data):
    stream = make_data({"a": DOCUMENTS}).stream("train", "a")
    assert [stream.n_windows(t) for t in (1, 2, 3, 7, 14, 15)] == [14, 7, 4, 2, 1, 0]


def test_many_ranges_are_read_as_one_by_one(make_data):
    stream = make_data({"a": DOCUMENTS}, shard_tokens=6).stream("train", "a")
    starts = np.array([10, 0, 3, 3, 7])
    assert stream.read_many(starts, 5).tolist() == [FLAT[s : s + 5] for s in starts]
    with pytest.raises(IndexError, match="15 tokens"):
        stream.read(11, 5)


@pytest.mark.parametrize("shard_tokens", [6, 50])
def test_documents_of_a_range_carry_origin_and_extent(make_data, shard_tokens):
    stream = make_data({"a": DOCUMENTS}, shard_tokens=shard_tokens).stream("train", "a")
    spans = stream.documents(3, 6)
    assert [(s.origin, s.start, s.stop) for s in spans] == [
        ("a:train:0", 0, 1),
        ("a:train:1", 1, 3),
        ("a:train:2", 3, 6),
    ]
    assert [s.origin for s in stream.documents(14, 1)] == ["a:train:4"]
    assert [s.origin for s in stream.documents(13, 2)] == ["a:train:3", "a:train:4"]
    assert [stream.document_text_ids(i).tolist() for i in range(5)] == DOCUMENTS
    assert stream.document_line(4)["origin"] == "a:train:4"
    assert stream.document_line(2) == {
        "origin": "a:train:2",
        "bytes": 15,
        "sha256": spans[2].sha256,
        "tokens": 6,
    }


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), max_size=8),
    shard_tokens=st.integers(1, 30),
)
def test_tokens_are_conserved_for_any_documents_and_shard_size(tmp_path_factory, documents, shard_tokens):
    folder = tmp_path_factory.mktemp("any")
    writer = ShardWriter(folder / "train" / "a", 100, shard_tokens)
    for ids in documents:
        writer.add(np.array(ids), "x", 0, "")
    records = writer.close()
    flat = [i for ids in documents for i in ids]
    stored = [i for r in records for i in np.fromfile(folder / r["file"], "<u2").tolist()]
    assert stored == flat
    assert sum(r["tokens"] for r in records) == len(flat)
    assert sum(r["documents"] for r in records) == len(documents)
    assert all(r["tokens"] <= shard_tokens or r["documents"] == 1 for r in records)
    assert [r["file"] for r in records] == [f"train/a/{i:05d}.bin" for i in range(len(records))]


def test_vocabularies_above_65536_are_stored_in_32_bits(make_data):
    stream = make_data({"a": [[65536, 3], [70000]]}, vocab_size=70_001).stream("train", "a")
    assert stream.read(0, 3).tolist() == [65536, 3, 70000]
    assert stream.read(0, 3).dtype == np.uint32
    assert (
        make_data({"a": [[65535]]}, vocab_size=65536, name="small").stream("train", "a").read(0, 1).dtype == np.uint16
    )


@pytest.mark.parametrize("ids", [[3, 100], [-1, 3]])
def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_written(tmp_path: Path, ids):
    writer = ShardWriter(tmp_path / "train" / "a", 100)
    writer.add(np.array([1, 99]), "good.txt", 3, "")
    with pytest.raises(DataError, match=r"document bad\.txt: token ids must be between 0 and 99; found"):
        writer.add(np.array(ids), "bad.txt", 3, "")
    assert [r["tokens"] for r in writer.close()] == [2]


def test_an_empty_split_has_no_tokens_and_no_windows(make_data):
    stream = make_data({"a": DOCUMENTS}).stream("validation", "a")
    assert (stream.n_tokens, stream.n_documents, stream.n_windows(4)) == (0, 0, 0)
    assert stream.documents(0, 4) == [] and stream.document_starts(0, 4).tolist() == []


def test_an_unknown_source_is_named_with_those_that_exist(make_data):
    shards = make_data({"a": DOCUMENTS, "b": [[1]]})
    assert shards.sources == ("a", "b")
    with pytest.raises(DataError, match=r"must hold source 'c' in split 'train'.*sources a, b"):
        shards.stream("train", "c")
