"""The benchmark of checkpoints measures real saves, ours and torch's, beside real steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tinylab.bench.checkpoint import bench_checkpoint
from tinylab.config.presets import tiny
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError


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
        saving=replace(base.saving, every_tokens=1600),
    )


def test_both_are_measured_in_every_window_and_the_share_is_theirs():
    found = bench_checkpoint(small(), windows=2)
    assert all(len(rounds) == 3 for rounds in found["rounds"].values())
    ours, theirs = found["medians"]["tinylab"], found["medians"]["torch async_save"]
    assert all(0 < row["blocked_s"] <= row["total_s"] for row in (ours, theirs))
    assert found["ratio_blocked"] == round(ours["blocked_s"] / theirs["blocked_s"], 3)
    assert (found["saves"], found["steps"]) == (9, 100), "steps 1 2 4 8 16, and 25 50 75 100"
    assert found["share"] == round(9 * ours["blocked_s"] / (100 * ours["step_s"]), 5)
    json.dumps(found)


def test_no_window_is_refused():
    with pytest.raises(ConfigError, match="windows must be at least 1; found 0"):
        bench_checkpoint(small(), windows=0)
