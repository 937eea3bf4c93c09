"""The training benchmark measures two equal models and says under which conditions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tinylab.bench.train as bench
from tinylab.bench.train import bench_train
from tinylab.config.presets import tiny
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError, TinylabError


def small() -> RunConfig:
    base = tiny()
    model = replace(base.model, vocab_size=64, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=24, seq_len=16)
    return replace(
        base,
        model=model,
        data=replace(base.data, vocab_size=64),
        stages=(replace(base.stages[0], tokens=6400, batch_tokens=64),),
        schedule=replace(base.schedule, warmup_tokens=640),
        parallel=replace(base.parallel, micro_batch=2, threads=1),
    )


def test_every_contender_is_measured_in_every_window_and_ratios_are_theirs():
    found = bench_train(small(), windows=2, steps_per_window=1)
    rows = found["tokens_per_s"]
    assert {r["precision"] for r in rows.values()} == {"fp32", "bf16"} and len(rows) == 4
    assert all(len(r["windows"]) == 2 and min(r["windows"]) > 0 for r in rows.values())
    assert found["ratio"] == round(rows["tinylab"]["median"] / rows["transformers"]["median"], 3)
    assert found["ratio_best"] == round(rows["tinylab"]["best"] / rows["transformers"]["best"], 3)
    assert found["max_logit_difference"] < 1e-4
    assert {"torch", "threads", "micro_batch", "seq_len", "batch_tokens", "formula", "device"} <= set(found)
    json.dumps(found)


def test_models_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    build = bench._peer

    def spoiled(*args):
        model = build(*args)
        torch.nn.init.zeros_(model.lm_head.weight)
        return model

    monkeypatch.setattr(bench, "_peer", spoiled)
    with pytest.raises(TinylabError, match="equal logits before their speed is compared"):
        bench_train(small(), windows=1)


def test_an_unknown_peer_is_refused():
    with pytest.raises(ConfigError, match="against must be transformers; found 'litgpt'"):
        bench_train(small(), against="litgpt")
