"""The benchmarks of opening and decoding: their record, and that sides that disagree are not compared."""

from __future__ import annotations

import json

import pytest
import torch

import tinylab.bench.decoding as decoding
import tinylab.bench.opening as opening
from tinylab.cli.command import main
from tinylab.config.architecture import Model
from tinylab.errors import ConfigError, TinylabError

SMALL = Model(vocab_size=64, n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=48, seq_len=32, init="normal")


def test_opening_gives_time_and_memory_of_both_sides(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "opening", "--preset", "tiny", "--windows", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] * 2 < found["bytes"] < found["parameters"] * 2 + 100_000
    for name, row in found["medians"].items():
        assert len(found["rounds"][name]) == 2 and row == found["rounds"][name][1]
        assert 0 < row["open_s"] < row["first_logits_s"]
        assert 50_000 < row["base_kib"] <= row["open_kib"] <= row["peak_kib"]
    ours, theirs = found["medians"]["tinylab"], found["medians"]["transformers"]
    for key in ("open_s", "first_logits_s", "open_kib", "peak_kib"):
        assert found[f"ratio_{key}"] == round(ours[key] / theirs[key], 3)
    assert found["max_logit_difference"] < 0.05 * found["largest_logit"]
    assert ours["base_kib"] < theirs["base_kib"], "a child must not count its parent's memory, nor the other's imports"


def test_decoding_gives_the_same_tokens_and_both_speeds(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "decoding", "--preset", "tiny", "--windows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["tokens_per_s"]
    assert set(rows) == {"tinylab", "transformers"} and found["equal_tokens"]
    assert all(len(r["windows"]) == 2 and min(r["windows"]) > 0 for r in rows.values())
    assert found["ratio"] == round(rows["tinylab"]["median"] / rows["transformers"]["median"], 3)
    assert found["new_tokens"] == 64 and {"threads", "precision", "against", "torch"} <= set(found)


def test_decoders_that_disagree_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    assert decoding.bench_decoding(SMALL, windows=1)["new_tokens"] == 16
    monkeypatch.setattr(decoding, "generate_ids", lambda model, ids, new: torch.zeros(1, 32, dtype=torch.int64))
    with pytest.raises(TinylabError, match="same tokens before their speed is compared"):
        decoding.bench_decoding(SMALL, windows=1)


def test_models_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    script = opening._CONTENDERS["tinylab"].replace("logits = model(ids)", "logits = 2 * model(ids)")
    assert script != opening._CONTENDERS["tinylab"]
    monkeypatch.setitem(opening._CONTENDERS, "tinylab", script)
    with pytest.raises(TinylabError, match="both must open the same model; their logits differ by"):
        opening.bench_opening(SMALL, windows=1)


def test_a_contender_that_fails_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(opening._CONTENDERS, "tinylab", "raise SystemExit('no such library')")
    with pytest.raises(TinylabError, match="it failed: no such library"):
        opening.bench_opening(SMALL, windows=1)


@pytest.mark.parametrize("bench", [opening.bench_opening, decoding.bench_decoding])
def test_no_window_is_refused(bench):
    with pytest.raises(ConfigError, match="windows must be at least 1"):
        bench(SMALL, windows=0)


@pytest.mark.parametrize("what", ["train", "parity", "opening", "decoding"])
def test_an_unknown_peer_is_wrong_usage(what: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", what, "--against", "litgpt"]) == 2
    assert "against must be transformers; found 'litgpt'" in capsys.readouterr().err
