"""Layouts are measured by real runs; one that cannot run says why beside those that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinylab.bench.scaling import bench_scaling
from tinylab.cli.command import main
from tinylab.errors import ConfigError, LaunchError

from ..dist.tiny_run import tiny_config


def test_each_layout_is_measured_once_and_compared_with_the_first(tmp_path: Path):
    config = tiny_config(tmp_path, 12)
    rows = bench_scaling(config, ranks=(1, 2, 3), strategies=("fsdp",), micro_batches=(8, 16), steps=8)
    names = ("strategy", "ranks", "threads", "micro_batch", "steps", "precision")
    assert [[row[name] for name in names] for row in rows] == [
        ["none", 1, 1, 8, 3, "fp32"],
        ["fsdp", 2, 1, 4, 3, "fp32"],
        ["fsdp", 3, None, 2, None, None],
    ], "a rank's micro-batch is at most its share of the 8 sequences of a step"
    first, second, refused = rows
    assert all(0 < row["low"] <= row["tokens_per_s"] <= row["high"] for row in (first, second))
    assert second["ratio"] == round(second["tokens_per_s"] / first["tokens_per_s"], 3)
    assert min(first["peak_memory_gib"], second["peak_memory_gib"]) > 0.1
    assert "ranks (3) must divide the sequences of a step (8)" in refused["refused"]
    assert refused["tokens_per_s"] is refused["ratio"] is None


def test_a_layout_whose_rank_dies_is_refused_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYLAB_FAILPOINT", "step.logged:2")
    with pytest.raises(LaunchError, match="one layout at least must run; .* rank 0 was killed by SIGKILL"):
        bench_scaling(tiny_config(tmp_path, 12), ranks=(1,), steps=6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 5}, "steps must be more than the 5 of the warm-up, .* found steps = 5"),
        ({"ranks": ()}, r"ranks = \[\]"),
        ({"ranks": (0, 1)}, r"ranks = \[0, 1\]"),
        ({"strategies": ("dpd",)}, "parallel.strategy must be one of .*'dpd'"),
        ({"micro_batches": (0,), "ranks": (2,)}, "parallel.micro_batch = 0: must be finite and greater than 0"),
        ({"device": "tpu"}, "parallel.device must be one of .*'tpu'"),
    ],
)
def test_what_no_layout_can_have_is_refused_before_anything_runs(given: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        bench_scaling(tiny_config(tmp_path, 12), **given)
    assert not (tmp_path / "prepared").exists()


def test_the_command_prints_a_row_for_each_layout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rows = [{"strategy": "ddp", "ranks": 2, "tokens_per_s": 1500.0, "refused": None}]
    monkeypatch.setattr("tinylab.bench.scaling.bench_scaling", lambda preset, device: rows)
    assert main(["bench", "scaling", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == [*rows[0], "ddp", "2", "1500", "-"]
