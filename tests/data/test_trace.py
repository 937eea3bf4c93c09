"""`tinylab batch`: the samples of a step with the documents that they come from."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.data.loader import Loader
from tinylab.data.trace import run_shards, stored_shards, trace_batch
from tinylab.errors import ConfigError, DataError
from tinylab.runs.folder import Run

SEQ = 4
DOCUMENTS = {
    "prose": [[5, 6, 7, 2], [8, 9, 2], [10, 2], [11, 12, 13, 14, 15, 2]],
    "code": [[20, 21, 22, 23, 24, 25, 26, 27, 2], [28, 2]],
}
CONFIG = RunConfig(
    model=Model(vocab_size=100, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=8, seq_len=SEQ),
    data=Data(
        sources=(Source(name="prose", corpus="local:prose"), Source(name="code", corpus="local:code")), vocab_size=100
    ),
    stages=(Stage(tokens=12 * SEQ, batch_tokens=4 * SEQ, mixture={"prose": 0.5, "code": 0.5}),),
    schedule=Schedule(kind="constant", warmup_tokens=0),
)


@pytest.fixture
def shards(make_data):
    return make_data(DOCUMENTS, shard_tokens=8)


def test_documents_of_every_sample_are_those_found_by_hand(shards):
    flat = {n: [(t, f"{n}:train:{i}") for i, d in enumerate(docs) for t in d] for n, docs in DOCUMENTS.items()}
    rows = [row for step in (1, 2, 3) for row in trace_batch(CONFIG, shards, step)]
    assert [r["n"] for r in rows] == list(range(12))
    for row in rows:
        assert row["first_token"] == SEQ * row["window"]
        expected = [origin for _, origin in flat[row["source"]][row["first_token"] : row["first_token"] + SEQ + 1]]
        found = [d["origin"] for d in row["documents"] for _ in range(d["tokens"])]
        assert found == expected
    text = "5 6 7 2"
    digests = {d["origin"]: d["sha256"] for r in rows for d in r["documents"]}
    assert digests["prose:train:0"] == hashlib.sha256(text.encode()).hexdigest()


def test_trace_names_the_samples_that_the_loader_reads(shards):
    with Loader(CONFIG, shards, start_step=2) as loader:
        inputs = torch.cat([m.inputs for m in next(loader).micro_batches]).numpy()
    for row, read in zip(trace_batch(CONFIG, shards, 2), inputs, strict=True):
        stream = shards.stream("train", row["source"])
        assert np.array_equal(stream.read(row["first_token"], SEQ), read)


def test_text_is_decoded_on_request(shards, monkeypatch):
    class Words:
        def decode(self, ids):
            return " ".join(f"w{i}" for i in ids)

    monkeypatch.setattr("tinylab.data.tokenizer.load.load_tokenizer_file", lambda path: Words())
    rows = [row for step in (1, 2, 3) for row in trace_batch(CONFIG, shards, step, text=True)]
    row = next(r for r in rows if (r["source"], r["window"]) == ("prose", 0))
    assert row["text"] == "w5 w6 w7 w2 w8"
    assert "text" not in trace_batch(CONFIG, shards, 1)[0]


def test_a_step_outside_the_run_is_refused(shards):
    with pytest.raises(ConfigError, match="step must lie between 1 and 3, the length of the run; found 4"):
        trace_batch(CONFIG, shards, 4)


def test_a_run_trained_on_other_data_than_are_there_now_is_not_explained_by_them(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("tinylab.data.trace.prepare", lambda data: shards)
    monkeypatch.setattr("tinylab.data.trace.data_path", lambda data: shards.path)
    run = Run(tmp_path / "run")
    run.create(CONFIG, {})
    assert run_shards(run) is shards  # before the run has begun
    run.write_journal("started", data_fingerprint=shards.fingerprint)
    assert run_shards(run) is shards
    assert stored_shards(run).path == shards.path
    run.write_journal("resumed", data_fingerprint="0" * 64)
    for opened in (run_shards, stored_shards):
        with pytest.raises(DataError, match=rf"trained on, fingerprint 0000.*; found {shards.fingerprint}: .*Restore"):
            opened(run)
