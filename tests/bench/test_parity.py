"""`bench parity`: the table's columns, and that a model which computes something else fails it."""

from __future__ import annotations

import pytest
import torch

from tinylab.bench import parity, sides
from tinylab.model import rope, transformer


@pytest.fixture(autouse=True)
def one_architecture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "architectures", lambda: {"base": parity.BASE})


def test_a_row_is_the_worst_of_its_models():
    row = parity.bench_parity(models=2)["rows"][0]
    alone = [parity.bench_parity(seed, models=1)["rows"][0] for seed in (0, 1)]
    for column in (
        "largest_logit",
        "fp32",
        "fp32_bound",
        "bf16_rms",
        "bf16_rms_transformers",
        "bf16",
        "bf16_transformers",
    ):
        assert row[column] == max(one[column] for one in alone)
    assert row["holds"] and row["largest_logit"] > 1 and 0 < row["bf16_rms"] < row["bf16"]


def test_another_rounding_of_the_tables_of_sines_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    exact = transformer.apply_rope
    monkeypatch.setattr(transformer, "apply_rope", lambda x, cos, sin: exact(x, cos.bfloat16(), sin.bfloat16()))
    found = parity.bench_parity(models=1)
    assert not found["holds"] and found["rows"][0]["fp32"] > 10 * found["rows"][0]["fp32_bound"]


def frequencies_one_pair_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope.rope_frequencies
    monkeypatch.setattr(rope, "rope_frequencies", lambda config: right(config).roll(1))


def another_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-6 instead of 1e-5 in the first norm alone. Later ones see a residual stream too large to care."""
    load = sides.load_folder

    def with_another(folder, **options):
        model = load(folder, **options)
        setattr(model.get_submodule("blocks.0.attn_norm"), "eps", 1e-6)  # noqa: B010
        return model

    monkeypatch.setattr(sides, "load_folder", with_another)


def heads_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    load = sides.load_folder

    def with_swapped(folder, **options):
        model = load(folder, **options)
        rows = model.get_parameter("blocks.2.attn.qkv.weight")
        rows[[0, 1]] = rows[[1, 0]]
        return model

    monkeypatch.setattr(sides, "load_folder", with_swapped)


@pytest.mark.parametrize("plant", [frequencies_one_pair_off, another_epsilon, heads_in_another_order])
def test_a_planted_error_exceeds_the_bound_by_far(plant, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    row = parity.bench_parity(models=1)["rows"][0]
    assert row["fp32"] > 100 * row["fp32_bound"] and not row["holds"]
    assert row["why"].startswith("fp32 differs by ")


def test_the_bound_is_the_roundings_of_two_evaluations_added_up():
    """By hand for BASE: 3 layers of 4·256 + 32 + 101 + 256 + 704 summands, and 512 around the head."""
    expected = 2**-24 * (2 * (3 * 2117 + 512)) ** 0.5 * 6.0
    assert parity.rounding_bound(parity.BASE, 101, 6.0) == pytest.approx(expected)
    assert 1e-5 < expected < 1e-4


def test_a_larger_error_in_bf16_alone_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    exact = transformer.apply_rope

    def rough(x, cos, sin):
        return exact(x, cos, sin) if x.dtype == torch.float32 else exact(x, cos, sin) * 1.02

    monkeypatch.setattr(transformer, "apply_rope", rough)
    row = parity.bench_parity(models=1)["rows"][0]
    assert row["fp32"] <= row["fp32_bound"] and row["greedy_equal"]
    assert row["bf16_rms"] > row["bf16_rms_transformers"] and not row["holds"]
    assert row["why"] == "the error in bf16 exceeds transformers'"
