"""The mixture: every source has its share at every sample, to within three, on ramps and trillions of samples in."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylab.config.presets import preset
from tinylab.config.schema import Source
from tinylab.data.order import DataOrder
from tinylab.errors import DataError

from .toy_runs import all_samples, consumed, stage, toy


def test_seven_to_three_by_hand():
    # 0.7n = .7 1.4 2.1 2.8 3.5 4.2 4.9 5.6 6.3 7.0 rounds to 1 1 2 3 4 4 5 6 6 7
    config = toy([stage(20, 10, {"a": 0.7, "b": 0.3})])
    rows = all_samples(DataOrder(config, {"a": 100, "b": 100}))
    assert "".join("ab"[r[1]] for r in rows) == "abaaabaaba" * 2


def test_equal_shares_of_four_sources_by_hand():
    # (ab|cd) alternates by [n/2] = 1 1 2 2: left first; inside each half again the first source first
    config = toy([stage(8, 8, {})], n_sources=4)
    rows = all_samples(DataOrder(config, dict.fromkeys("abcd", 9)))
    assert "".join("abcd"[r[1]] for r in rows) == "acbdacbd"


mixtures = st.integers(2, 8).flatmap(
    lambda k: st.lists(st.integers(0, 1000), min_size=k, max_size=k).filter(lambda w: sum(w) > 0)
)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(weights=mixtures, batch=st.sampled_from([7, 64, 250]))
def test_every_prefix_is_within_a_sample_and_a_half_and_every_batch_within_three(weights, batch):
    names = "abcdefgh"[: len(weights)]
    config = toy([stage(1000, batch, dict(zip(names, map(float, weights), strict=True)))], len(weights))
    order = DataOrder(config, dict.fromkeys(names, 50))
    source = np.concatenate([order.samples(s).source for s in range(1, config.steps + 1)])
    n = np.arange(1, len(source) + 1)
    for i, weight in enumerate(weights):
        exact = n * (weight / sum(weights))
        error = np.cumsum(source == i) - exact
        assert np.abs(error).max() <= 1.5 + 1e-9
        in_batches = np.diff(error[batch - 1 :: batch], prepend=0.0)
        assert np.abs(in_batches).max() <= 3


@pytest.mark.parametrize("skew", [0, 1])
def test_more_sources_add_half_a_sample_per_level_of_the_tree(skew):
    names = [f"s{i}" for i in range(22)]
    weights = [1000.0 if i == 0 and skew else 1.0 + i % 3 for i in range(22)]
    config = toy([stage(4096, 256, {})])
    sources = tuple(Source(name=n, corpus="local:prose") for n in names)
    stages = (replace(config.stages[0], mixture=dict(zip(names, weights, strict=True))),)
    order = DataOrder(
        replace(config, data=replace(config.data, sources=sources), stages=stages), dict.fromkeys(names, 9)
    )
    source = np.array([r[1] for r in all_samples(order)])
    for i, weight in enumerate(weights):
        error = np.cumsum(source == i) - np.arange(1, 4097) * (weight / sum(weights))
        assert np.abs(error).max() <= 2.5


def test_a_share_of_almost_nothing_takes_its_first_sample_when_it_is_due():
    config = toy([stage(4000, 100, {"a": 1.0, "b": 1e-3, "c": 1e-9, "d": 5e-324})], 4)
    order = DataOrder(config, dict.fromkeys("abcd", 10))
    source = np.array([r[1] for r in all_samples(order)])
    assert np.bincount(source, minlength=4).tolist() == [3996, 4, 0, 0]
    assert np.flatnonzero(source == 1).tolist() == [500, 1501, 2502, 3503]  # (n + 1)/1001 passes 0.5, 1.5 …


def test_a_share_of_nothing_gets_nothing_and_a_share_of_everything_all():
    config = toy([stage(50, 5, {"a": 1.0}, "one"), stage(50, 5, {"c": 2.0}, "two")], 3)
    source = [r[1] for r in all_samples(DataOrder(config, {"a": 3, "c": 3}))]
    assert source == [0] * 50 + [2] * 50


@pytest.mark.parametrize("ramp", [10, 600, 4000])
def test_a_ramp_follows_the_straight_line_between_the_mixtures(ramp):
    first, second = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.1, "b": 0.2, "c": 0.7}
    config = toy([stage(500, 100, first, "one"), stage(4000, 100, second, "two", ramp)], 3)
    order = DataOrder(config, dict.fromkeys("abc", 1000))
    source = np.array([r[1] for r in all_samples(order)])
    x = np.clip(np.arange(len(source)) - 500 + 0.5, 0, ramp) / ramp  # the share of sample n is taken at its middle
    for i, name in enumerate("abc"):
        exact = np.cumsum(first[name] + (second[name] - first[name]) * x)
        assert np.abs(np.cumsum(source == i) - exact).max() <= 1.5 + 0.25


def test_a_ramp_in_the_first_stage_has_nothing_to_come_from():
    flat = toy([stage(40, 8, {"a": 0.7, "b": 0.3})])
    ramped = toy([stage(40, 8, {"a": 0.7, "b": 0.3}, ramp=40)])
    windows = {"a": 9, "b": 9}
    assert all_samples(DataOrder(flat, windows)) == all_samples(DataOrder(ramped, windows))


def test_consumed_counts_what_samples_lists_at_every_step():
    config = toy([stage(90, 9, {"a": 3.0, "b": 1.0, "c": 2.0}, "one"), stage(64, 16, {"c": 1.0}, "two", 30)], 3)
    order = DataOrder(config, dict.fromkeys("abc", 11))
    counts = dict.fromkeys("abc", 0)
    assert consumed(order, 0) == counts
    for step in range(1, config.steps + 1):
        for i, name in enumerate("abc"):
            counts[name] += int((order.samples(step).source == i).sum())
        assert consumed(order, step) == counts


def test_step_ten_to_the_ninth_is_computed_and_not_counted_up_to():
    steps, batch = 10**9, 64
    shares = [{"a": 0.7, "b": 0.3}, {"a": 0.2, "b": 0.8}]
    ramp = steps * batch // 2
    stages = [stage(steps * batch, batch, shares[0], "one"), stage(steps * batch, batch, shares[1], "two", ramp)]
    order = DataOrder(toy(stages), {"a": 12_345, "b": 999})
    for step in (1, 2, steps, steps + 1, steps + steps // 4, 2 * steps):
        source = order.samples(step).source
        before, after = consumed(order, step - 1), consumed(order, step)
        assert [int((source == i).sum()) for i in (0, 1)] == [after[n] - before[n] for n in "ab"]
    share_of_a = 0.7 * 1 + (0.7 + 0.2) / 2 * 0.5 + 0.2 * 0.5  # the first stage, the ramp, what follows it
    assert consumed(order, 2 * steps)["a"] == pytest.approx(share_of_a * steps * batch, abs=2)


def test_shares_that_no_small_fraction_gives_stay_exact_over_trillions():
    config = preset("tinyllama_1b")
    share = 0.1234567890123457
    config = replace(config, stages=(replace(config.stages[0], mixture={"slimpajama": share, "starcoder": 1 - share}),))
    order = DataOrder(config, {"slimpajama": 10**9, "starcoder": 10**9})
    count = consumed(order, config.steps)["slimpajama"]
    assert abs(count - Fraction(str(share)) * 1_430_512 * 1024) < 1
    assert (order.samples(config.steps).source == 0).sum() in (126, 127)


def test_a_source_with_a_share_and_no_window_is_named():
    config = toy([stage(8, 8, {"a": 1.0, "c": 1.0})], 3)
    with pytest.raises(DataError, match=r"seq_len \+ 1 = 5 training tokens; found fewer in: c\. Give more text"):
        DataOrder(config, {"a": 3, "b": 0, "c": 0})
    assert len(DataOrder(config, {"a": 1, "b": 0, "c": 1}).samples(1)) == 8
