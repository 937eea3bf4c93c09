"""A configuration that would fail late or silently fails at once, naming both fields and a remedy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tinylab.config.architecture import Model, RopeScaling, nearest_divisor
from tinylab.config.presets import preset, tiny
from tinylab.config.schema import Data, Optimizer, RunConfig, Saving, Source, Validation
from tinylab.config.stages import Schedule, Stage
from tinylab.errors import ConfigError


def test_wrong_head_count_names_both_fields_and_a_remedy():
    with pytest.raises(ConfigError, match=r"n_head \(30\) must divide .*d_model \(2048\).*nearest valid: 32"):
        replace(preset("tinyllama_1b").model, n_head=30)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Model(n_kv_head=5), r"model\.n_kv_head \(5\) must divide model\.n_head \(32\); nearest valid: 4"),
        (lambda: Model(d_model=32, n_head=32, n_kv_head=1), r"head size must be even .* found 1"),
        (lambda: Model(d_head=-2), r"model\.d_head = -2: must be finite and greater than 0"),
        (lambda: Model(n_layer=0, norm_eps=math.nan), r"model\.n_layer = 0, model\.norm_eps = nan: must be finite"),
        (
            lambda: RopeScaling(high_freq_factor=1.0),
            r"high_freq_factor must exceed low_freq_factor; found 1\.0 and",
        ),
        (lambda: Source(name="a b", corpus="local:prose"), r"name must be an identifier; found 'a b'"),
        (lambda: Source(name="a", corpus="http://x"), r"must begin with local:, files: or hf:; found 'http://x'"),
        (lambda: Source(name="a", corpus="local:prose", limit_mb=0.0), r"data\.sources\.a\.limit_mb = 0\.0"),
        (lambda: Data(sources=()), r"data\.sources must name at least one source"),
        (lambda: Data(sources=(tiny().data.sources[0],) * 2), r"different names; found twice: prose"),
        (lambda: Data(validation_fraction=0.5), r"validation_fraction must lie between 0 and 0\.5"),
        (lambda: Stage(tokens=0), r"stages\.pretrain\.tokens = 0"),
        (
            lambda: Stage(tokens=10, ramp_tokens=11),
            r"between 0 and the stage's tokens \(10\); found 11",
        ),
        (lambda: Stage(mixture={"a": -1.0}), r"mixture must hold finite shares of at least 0 .* found \{'a': -1\.0\}"),
        (lambda: Stage(mixture={"a": 0.0}), r"with a positive sum"),
        (lambda: Stage(lr_end=0.1), r'lr_end needs stages\.pretrain\.lr = "linear" or "cosine"; found lr = "schedule"'),
        (lambda: Stage(lr="linear", lr_end=2.0), r"lr_end must lie between 0 and 1"),
        (lambda: Schedule(end=1.0), r"schedule\.end must lie below 1 .* does not decay; found 1\.0"),
        (lambda: Schedule(kind="constant", end=-0.1), r"schedule\.end must be at least 0: .*; found -0\.1"),
        (lambda: Schedule(warmup_tokens=-1), r"warmup_tokens must be at least 0; found -1"),
        (lambda: Schedule(decay_fraction=0.0), r"decay_fraction must lie above 0"),
        (lambda: Optimizer(lr=0.0), r"optimizer\.lr = 0\.0"),
        (lambda: Optimizer(betas=(0.9, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda: Optimizer(clip_norm=-1.0), r"optimizer\.clip_norm = -1\.0"),
        (lambda: Optimizer(weight_decay=math.inf), r"weight_decay must be finite and at least 0; found inf"),
        (lambda: Saving(keep=0), r"saving\.keep must be at least 1, or absent to keep all; found 0"),
        (lambda: Validation(sequences=0), r"validation\.sequences = 0"),
        (lambda: RunConfig(seed=-1), r"seed must lie between 0 and 2\^63 - 1; found -1"),
        (
            lambda: RunConfig(data=Data(vocab_size=50)),
            r"vocab_size \(32000\) must equal data\.vocab_size \(50\)",
        ),
        (lambda: replace(tiny(), stages=()), r"stages must hold at least one stage"),
        (
            lambda: replace(tiny(), stages=tiny().stages * 2),
            r"must have different names; found pretrain, pretrain",
        ),
        (
            lambda: replace(tiny(), stages=(Stage(batch_tokens=4000),)),
            r"stages\.pretrain\.batch_tokens \(4000\) must be a multiple of model\.seq_len \(256\); .* 3840 or 4096",
        ),
        (
            lambda: replace(tiny(), stages=(Stage(batch_tokens=100),)),
            r"batch_tokens \(100\) must be a multiple .* nearest valid: 256 or 512",
        ),
        (
            lambda: replace(tiny(), stages=(Stage(batch_tokens=4096, mixture={"books": 1.0}),)),
            r"mixture names unknown sources: books; data\.sources has prose, code",
        ),
        (
            lambda: replace(tiny(), schedule=Schedule(warmup_tokens=2_097_152)),
            r"warmup_tokens \(2097152\) must be less than the run's tokens \(2097152\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_value(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(("of", "near", "expected"), [(2048, 30, 32), (12, 5, 6), (12, 100, 12), (7, 4, 7), (1, 1, 1)])
def test_nearest_divisor_by_hand(of, near, expected):
    assert nearest_divisor(of, near) == expected


def test_nearest_divisor_of_a_huge_number_does_not_search_it_all():
    assert nearest_divisor(2**61 - 1, 2**40) == 1


def test_steps_tokens_and_stages_by_hand():
    run = replace(
        tiny(),
        stages=(
            Stage(name="one", tokens=1000, batch_tokens=512),
            Stage(name="two", tokens=1024, batch_tokens=1024),
            Stage(name="three", tokens=1, batch_tokens=256),
        ),
        schedule=Schedule(warmup_tokens=0),
    )
    assert (run.steps, run.tokens) == (4, 2304)
    assert run.stage_bounds() == ((1, 2), (3, 3), (4, 4))
    assert [run.tokens_at(s) for s in range(6)] == [0, 512, 1024, 2048, 2304, 2304]
    assert [run.stage_index(s) for s in (1, 2, 3, 4)] == [0, 0, 1, 2]
    for step in (0, 5):
        with pytest.raises(ConfigError, match=f"step must lie between 1 and 4, the length of the run; found {step}"):
            run.stage_index(step)


def test_mixture_is_normalized_and_equal_where_none_is_given():
    run = replace(tiny(), stages=(Stage(batch_tokens=256, mixture={"code": 3.0}), Stage(name="b", batch_tokens=256)))
    assert run.mixture(0) == {"prose": 0.0, "code": 1.0}
    assert run.mixture(1) == {"prose": 0.5, "code": 0.5}
