"""`bench parity`: the table's columns, and that a model which computes something else fails it."""

from __future__ import annotations

import pytest
import torch

from tinylab.bench import parity
from tinylab.model import transformer


@pytest.fixture(autouse=True)
def one_architecture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "architectures", lambda: {"base": parity.BASE})


def test_a_row_is_the_worst_of_its_models():
    row = parity.bench_parity(models=2)["rows"][0]
    alone = [parity.bench_parity(seed, models=1)["rows"][0] for seed in (0, 1)]
    for column in ("largest_logit", "fp32", "bf16_rms", "bf16_rms_transformers", "bf16", "bf16_transformers"):
        assert row[column] == max(one[column] for one in alone)
    assert row["holds"] and row["largest_logit"] > 1 and 0 < row["bf16_rms"] < row["bf16"]


def test_another_rounding_of_the_tables_of_sines_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    exact = transformer.apply_rope
    monkeypatch.setattr(transformer, "apply_rope", lambda x, cos, sin: exact(x, cos.bfloat16(), sin.bfloat16()))
    found = parity.bench_parity(models=1)
    assert not found["holds"] and found["rows"][0]["fp32"] > 10 * parity.FP32_LIMIT


def test_a_larger_error_in_bf16_alone_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    exact = transformer.apply_rope

    def rough(x, cos, sin):
        return exact(x, cos, sin) if x.dtype == torch.float32 else exact(x, cos, sin) * 1.02

    monkeypatch.setattr(transformer, "apply_rope", rough)
    row = parity.bench_parity(models=1)["rows"][0]
    assert row["fp32"] <= parity.FP32_LIMIT and row["greedy_equal"]
    assert row["bf16_rms"] > row["bf16_rms_transformers"] and not row["holds"]
