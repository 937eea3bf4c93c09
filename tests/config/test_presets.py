"""Presets carry the published numbers, and scale to any length."""

from __future__ import annotations

import pytest

from tinylab.config.architecture import Model
from tinylab.config.io import run_from_dict, run_to_dict
from tinylab.config.presets import PRESETS, preset, scale_tokens
from tinylab.errors import ConfigError


def parameters(m: Model) -> int:
    """Closed form of a Llama's parameters with untied head."""
    attention = 2 * m.d_model * m.n_head * m.head_size + 2 * m.d_model * m.n_kv_head * m.head_size
    return 2 * m.vocab_size * m.d_model + m.n_layer * (attention + 3 * m.d_model * m.d_ff + 2 * m.d_model) + m.d_model


def test_tinyllama_1b_has_its_published_numbers():
    run = preset("tinyllama_1b")
    assert (run.steps, run.tokens) == (1_430_512, 3_000_001_101_824)
    assert parameters(run.model) == 1_100_048_384
    assert run.stages[0].batch_tokens == 1024 * 2048
    assert run.schedule.warmup_tokens == 2000 * 2_097_152
    assert (run.optimizer.lr, run.optimizer.lr * run.schedule.end) == (4e-4, pytest.approx(4e-5))
    assert (run.optimizer.betas, run.optimizer.weight_decay, run.optimizer.clip_norm) == ((0.9, 0.95), 0.1, 1.0)
    assert run.mixture(0) == pytest.approx({"slimpajama": 0.693584, "starcoder": 0.306416})
    assert (run.seed, run.model.seq_len, run.model.vocab_size) == (3407, 2048, 32_000)


def test_tinyllama_v1_1_has_three_stages_of_two_trillion_tokens():
    run = preset("tinyllama_v1_1")
    assert [s.name for s in run.stages] == ["basic", "continual", "cooldown"]
    assert [s.tokens for s in run.stages] == [1_500_000_000_000, 350_000_000_000, 150_000_000_000]
    assert [round(s.batch_tokens / 1e6, 1) for s in run.stages] == [1.8, 1.8, 7.2]


def test_tinyllama_120m_has_its_published_size():
    assert parameters(preset("tinyllama_120m").model) == 121_129_728


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_carries_its_name_and_survives_a_round_trip(name):
    run = preset(name)
    assert run.preset == name
    assert run_from_dict(run_to_dict(run)) == run


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tokens", [1, 200_000, 12_345_678])
def test_every_preset_scales_to_any_length(name, tokens):
    run = preset(name, tokens=tokens)
    slack = sum(s.batch_tokens for s in run.stages)
    assert tokens <= run.tokens + len(run.stages) and run.tokens < tokens + slack
    assert len(run.stages) == len(preset(name).stages)


def test_scaling_keeps_the_proportions_of_stages_ramps_and_warm_up():
    run = preset("demo", tokens=2 * 2_007_040)
    assert [s.tokens for s in run.stages] == [2 * 1_499_136, 2 * 507_904]
    assert run.stages[1].ramp_tokens == 2 * 81_920
    assert run.schedule.warmup_tokens == 80_000  # a longer run keeps its warm-up
    assert preset("demo", tokens=2_007_040 // 2).schedule.warmup_tokens == 40_000


def test_names_may_be_spelled_with_dots_and_dashes():
    assert preset("TinyLlama-1.1B") == preset("tinyllama_1b")
    assert preset("tinyllama-v1.1") == preset("tinyllama_v1_1")


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"one of tiny, demo, .*found 'tinylama-1b'\. did you mean tinyllama_1b\?"):
        preset("tinylama-1b")
    with pytest.raises(ConfigError, match="tokens must be at least 1; found 0"):
        scale_tokens(preset("tiny"), 0)
