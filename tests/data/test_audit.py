"""The audit finds each planted defect, and nothing in clean data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tinylab.data import audit
from tinylab.data.audit import audit_shards, find_runs
from tinylab.data.shards.format import fingerprint_of
from tinylab.data.shards.reader import open_shards

CLEAN = {"prose": [[5, 6, 7, 2], [8, 9, 9, 9, 2], [10, 2]], "code": [[20, 21, 2]]}


def test_clean_data_have_no_problem_and_exact_counts(make_data):
    report = audit_shards(make_data(CLEAN, {"prose": [[30, 31, 2]], "code": []}, shard_tokens=6), seq_len=4)
    assert report["problems"] == []
    assert report["splits"]["train"]["prose"] == {
        "tokens": 11,
        "documents": 3,
        "bytes": len("5 6 7 2") + len("8 9 9 9 2") + len("10 2"),
        "shards": 3,
        "min_id": 2,
        "max_id": 10,
        "longest_run": 3,
        "long_runs": 0,
        "windows": 2,
        "rest_tokens": 2,
    }
    empty = report["splits"]["validation"]["code"]
    assert (empty["tokens"], empty["min_id"], empty["longest_run"], empty["windows"]) == (0, None, 0, 0)
    assert report["repeated_documents"] == {"train": 0, "validation": 0, "validation_in_train": 0}


@pytest.mark.parametrize("shard_tokens", [40, 1000])
def test_a_planted_run_of_bos_is_found_with_its_place_and_document(make_data, shard_tokens):
    shards = make_data({"prose": [[5, 6, 2], [1] * 64, [7, 2]], "code": [[1] * 63]}, shard_tokens=shard_tokens)
    (problem,) = audit_shards(shards)["problems"]
    assert problem.startswith("train/prose: id 1 64 times in a row at ")
    assert problem.endswith("document prose:train:1")


def test_a_run_over_documents_shards_and_chunks_is_one_run(make_data, monkeypatch):
    shards = make_data({"prose": [[5] * 7, [5] * 9, [6], [5] * 4], "code": [[2]]}, shard_tokens=7)
    for chunk in (1, 3, 5, 16, 100):
        monkeypatch.setattr(audit, "_CHUNK", chunk)
        runs = [np.stack(r, axis=1).tolist() for r in find_runs(shards.stream("train", "prose"))]
        assert [r for part in runs for r in part] == [[0, 16, 5], [16, 1, 6], [17, 4, 5]]
    (problem,) = audit_shards(shards, max_run=16)["problems"]
    assert "id 5 16 times in a row" in problem and "00000.bin, token 0" in problem


def test_many_runs_are_named_in_part_and_counted_in_full(make_data):
    shards = make_data({"prose": [[5, 5, 5, 2]] * 8, "code": [[2]]})
    problems = audit_shards(shards, max_run=3)["problems"]
    assert len(problems) == 6 and problems[-1] == "train/prose: 3 more runs of at least 3 equal ids"


def test_validation_documents_that_are_trained_on_are_named(make_data):
    report = audit_shards(make_data(CLEAN | {"code": [[20, 21, 2], [20, 21, 2]]}, {"prose": [[20, 21, 2]], "code": []}))
    assert report["problems"] == ["1 validation documents are also trained on, such as prose:validation:0"]
    assert report["repeated_documents"] == {"train": 1, "validation": 0, "validation_in_train": 1}


def test_validation_text_inside_longer_training_text_is_measured(make_data, monkeypatch):
    """A docstring held out of `prose` and trained on inside its function in `code`."""
    words = np.random.default_rng(0).integers(3, 100, 400).tolist()
    copied, own = words[:60], words[60:120]
    train = {"prose": [words[120:200]], "code": [[*words[200:250], *copied, *words[250:300]]], "empty": [[5]]}
    validation = {"prose": [[*copied, 2], [*own, 2]], "code": [[*words[300:400], 2]], "empty": []}
    shards = make_data(train, validation, shard_tokens=70)
    expected = {"prose": 60 / 122, "code": 0.0, "empty": None}
    for chunk in (1000, 160, 64, 1):
        monkeypatch.setattr(audit, "_CHUNK", chunk)
        report = audit_shards(shards)
        assert report["copied"] == expected and report["problems"] == []
    short = make_data({"prose": [copied[:49]]}, {"prose": [copied[:49]]}, name="short")
    assert audit_shards(short)["copied"] == {"prose": 0.0}


def test_counts_that_the_files_do_not_bear_out_are_all_listed(make_data):
    path = make_data(CLEAN).path
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["splits"]["train"]["prose"]
    entry["bytes"] += 1
    entry["shards"][0]["max_id"] = 11
    entry["shards"][0]["min_id"] = 3
    manifest["fingerprint"] = fingerprint_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    lines = "\n".join(audit_shards(open_shards(path))["problems"])
    for what in (
        "bytes of text: the manifest says 21, found 20",
        "smallest id: the manifest says 3, found 2",
        "largest id: the manifest says 11",
    ):
        assert what in lines


def test_an_index_that_cuts_elsewhere_and_an_id_beyond_the_vocabulary_are_found(make_data):
    shards = make_data(CLEAN)
    assert audit_shards(shards)["problems"] == []  # the files are compared with their digests before they change
    starts = np.memmap(shards.path / "train/prose/00000.idx", dtype="<i8", mode="r+")
    starts[1] += 1
    starts.flush()
    ids = np.memmap(shards.path / "train/prose/00000.bin", dtype="<u2", mode="r+")
    ids[0] = 101
    ids.flush()
    lines = "\n".join(audit_shards(shards)["problems"])
    assert "train/prose: the index of document starts differs" in lines
    assert "train/prose: ids must be below 100; found 101" in lines
