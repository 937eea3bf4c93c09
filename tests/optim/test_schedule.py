"""The learning rate against values worked out by hand and against TinyLlama's published plan."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tinylab.config.architecture import Model
from tinylab.config.presets import tinyllama_1b, tinyllama_v1_1
from tinylab.config.schema import Data, Optimizer, RunConfig, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.errors import ConfigError
from tinylab.optim.schedule import check_schedule, lr_at

# Steps of 10 tokens, a peak of 1: fractions can be read off.
MODEL = Model(vocab_size=8, n_layer=1, d_model=4, n_head=1, n_kv_head=1, d_ff=4, seq_len=10)
DATA = Data(sources=(Source(name="a", corpus="local:prose"),), vocab_size=8)


def run(*stages: Stage, warmup: int = 0, **schedule) -> RunConfig:
    return RunConfig(
        model=MODEL,
        data=DATA,
        stages=stages or (Stage(tokens=100, batch_tokens=10),),
        schedule=Schedule(warmup_tokens=warmup, **schedule),
        optimizer=Optimizer(lr=1.0),
    )


def rates(config: RunConfig) -> list[float]:
    return [lr_at(config, step) for step in range(1, config.steps + 1)]


def test_warmup_rises_evenly_to_the_peak_and_never_starts_at_zero():
    assert rates(run(warmup=40, kind="constant"))[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_cosine_equals_values_worked_out_by_hand():
    # After a warm-up of 20 tokens 80 are left; t = 20, 40, 60, 80, 90 are 0, 1/4, 1/2, 3/4, 7/8 of them.
    found = rates(run(warmup=20, kind="cosine", end=0.1))
    root = math.sqrt(0.5)
    assert [found[i] for i in (2, 4, 6, 8)] == pytest.approx(
        [1, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root)]
    )
    assert found[9] == pytest.approx(0.1 + 0.45 * (1 - 0.9238795325))


def test_linear_equals_values_worked_out_by_hand():
    assert rates(run(kind="linear", end=0.5)) == pytest.approx([1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])


def test_wsd_stays_at_the_peak_then_falls_over_the_decay_fraction():
    found = rates(run(kind="wsd", end=0.0, decay_fraction=0.4))
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("step", "planned"),
    [
        (50_000, 3.990e-4),
        (240_000, 3.759e-4),
        (480_000, 3.094e-4),
        (715_000, 2.205e-4),
        (955_000, 1.298e-4),
        (1_195_000, 6.361e-5),
        (1_430_512, 4e-5),
    ],
)
def test_tinyllama_milestones_have_the_planned_rate(step: int, planned: float):
    """What TinyLlama's own code computes, printed to four digits: half a digit of tolerance.

    It counts k + 7/8 steps where we count k; one step is below 1e-9 of rate, so it cannot show in four digits.
    """
    assert lr_at(tinyllama_1b(), step) == pytest.approx(planned, abs=0.5 * 10 ** (math.floor(math.log10(planned)) - 3))


def test_batch_growth_moves_along_the_same_curve():
    """v1.1's cooldown takes steps four times as long: at equal tokens the rate is that of the small batch."""
    grown = tinyllama_v1_1()
    small = replace(grown, stages=(replace(grown.stages[0], tokens=grown.tokens),))
    assert small.tokens == grown.tokens
    first = grown.stage_bounds()[2][0]
    tokens = grown.tokens_at(first - 1)
    assert lr_at(grown, first) == pytest.approx(lr_at(small, tokens // small.stages[0].batch_tokens + 1), rel=1e-12)


@pytest.mark.parametrize("batch_tokens", [10, 20, 40])
def test_equal_tokens_give_equal_rates_whatever_the_batch(batch_tokens: int):
    config = run(Stage(tokens=400, batch_tokens=batch_tokens), kind="cosine")
    found = {config.tokens_at(s - 1): lr_at(config, s) for s in range(1, config.steps + 1)}
    fine = run(Stage(tokens=400, batch_tokens=10), kind="cosine")
    assert found == {t: lr_at(fine, t // 10 + 1) for t in found}


def test_micro_batch_and_ranks_do_not_enter_the_rate():
    config = run(kind="cosine", warmup=20)
    for micro_batch in (1, 2, 4, 8):
        split = replace(config, parallel=replace(config.parallel, micro_batch=micro_batch))
        assert rates(split) == rates(config)


def test_a_stage_of_its_own_goes_on_from_the_rate_before_it():
    stages = (
        Stage(name="basic", tokens=50, batch_tokens=10),
        Stage(name="hold", tokens=20, batch_tokens=10, lr="constant"),
        Stage(name="fall", tokens=30, batch_tokens=10, lr="linear", lr_end=0.0),
    )
    # The schedule is a line from 1 to 0.5 over 100 tokens: 0.75 after the first 50.
    found = rates(run(*stages, kind="linear", end=0.5))
    assert found == pytest.approx([1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.75, 0.75, 0.5, 0.25])


def test_a_cosine_segment_without_an_end_goes_to_the_schedules_end():
    stages = (
        Stage(name="a", tokens=80, batch_tokens=10, lr="constant"),
        Stage(name="b", tokens=20, batch_tokens=10, lr="cosine"),
    )
    assert rates(run(*stages, end=0.2))[-2:] == pytest.approx([1.0, 0.6])


def test_a_decay_that_does_not_decay_is_refused():
    stages = (
        Stage(name="low", tokens=50, batch_tokens=10, lr="linear", lr_end=0.1),
        Stage(name="cooldown", tokens=50, batch_tokens=10, lr="cosine", lr_end=0.1),
    )
    with pytest.raises(ConfigError, match=r"stages\.cooldown\.lr_end must lie below .*\(0\.1 of .*found 0\.1"):
        check_schedule(run(*stages))
    check_schedule(run(stages[0], replace(stages[1], lr_end=0.05)))


def test_a_step_outside_the_run_is_refused():
    with pytest.raises(ConfigError, match="between 1 and 10"):
        lr_at(run(), 11)
