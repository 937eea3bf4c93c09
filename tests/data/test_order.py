"""The batch of a step: a slow reference in fractions, exact counts, and properties over random configurations."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinylab.config.presets import preset
from tinylab.config.schema import RunConfig
from tinylab.data.order import DataOrder, check_ranks, data_hash, format_hash, permute, rank_slice
from tinylab.errors import ConfigError

from .toy_runs import SEQ, all_samples, consumed, stage, toy

MASK = 2**64 - 1


# ---- a slow reference: one sample at a time, exact fractions, Python integers -------------------------------------


def reference_shares(config: RunConfig) -> list[list[Fraction]]:
    """Shares of the sources at every sample of the run."""
    result: list[list[Fraction]] = []
    old: list[Fraction] = []
    for s in config.stages:
        given_shares = [Fraction(str(s.mixture.get(n, 0.0))) for n in config.data.source_names]
        new = [x / sum(given_shares) for x in given_shares]
        ramp = s.ramp_tokens // SEQ if old and old != new else 0
        count = min(ramp, math.isqrt(ramp) + 1)
        for x in range(s.steps * s.batch_tokens // SEQ):
            if x < ramp:
                k = next(k for k in range(count) if ramp * k // count <= x < ramp * (k + 1) // count)
                middle = Fraction(ramp * k // count + ramp * (k + 1) // count, 2 * ramp)
                result.append([a + (b - a) * middle for a, b in zip(old, new, strict=True)])
            else:
                result.append(new)
        old = new
    return result


class Tie(Exception):
    """A running sum of exactly one half behind the start of a ramp, where 40 binary digits decide."""


def reference_numbers(config: RunConfig) -> list[tuple[int, int]]:
    """(source, number in source) of every sample, by walking the tree with running sums."""
    first_ramp = next((i for i, s in enumerate(config.stages) if i and s.ramp_tokens), len(config.stages))
    exact_until = sum(s.steps * s.batch_tokens // SEQ for s in config.stages[:first_ramp])
    sums: dict[tuple[int, ...], Fraction] = {}
    counts: dict[int, int] = {}
    result = []
    for n, shares in enumerate(reference_shares(config)):
        group = tuple(range(len(shares)))
        while len(group) > 1:
            left, right = group[: (len(group) + 1) // 2], group[(len(group) + 1) // 2 :]
            before = sums.get(group, Fraction(0))
            total = sum(shares[i] for i in group)
            after = before + sum(shares[i] for i in left) / total
            sums[group] = after
            half = Fraction(1, 2)
            if n >= exact_until and half in (before % 1, after % 1):
                raise Tie
            group = left if math.floor(after + half) > math.floor(before + half) else right
        (source,) = group
        result.append((source, counts.get(source, 0)))
        counts[source] = counts.get(source, 0) + 1
    return result


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference_window(seed: int, name: str, epoch: int, place: int, size: int) -> int:
    golden = 0x9E3779B97F4A7C15
    base = int.from_bytes(hashlib.sha256(f"tinylab order 1\0{seed}\0{name}".encode()).digest()[:8], "little")
    key = mix((epoch * golden + base) & MASK)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(place, columns)
        for i in (1, 3, 5, 7):
            row = (row + mix((key + (column * 8 + i) * golden) & MASK)) % rows
            column = (column + mix((key + (row * 8 + i + 1) * golden) & MASK)) % columns
        place = row * columns + column
        if place < size:
            return place


def reference(config: RunConfig, windows: dict[str, int]) -> list[tuple[int, int, int, int]]:
    rows = []
    for n, (source, number) in enumerate(reference_numbers(config)):
        name = config.data.source_names[source]
        epoch, place = divmod(number, windows[name])
        rows.append((n, source, epoch, reference_window(config.seed, name, epoch, place, windows[name])))
    return rows


# ---- exactness ----------------------------------------------------------------------------------------------------

GOLDEN_RUN = toy([stage(8, 4, {"a": 0.7, "b": 0.3}, "one"), stage(6, 6, {"b": 1.0}, "two", ramp=3)])
GOLDEN_WINDOWS = {"a": 5, "b": 3}
# (n, source, epoch, window)
GOLDEN = [
    (0, 0, 0, 2),
    (1, 1, 0, 2),
    (2, 0, 0, 4),
    (3, 0, 0, 3),
    (4, 0, 0, 1),
    (5, 1, 0, 1),
    (6, 0, 0, 0),
    (7, 0, 1, 3),
    (8, 1, 0, 0),
    (9, 1, 1, 1),
    (10, 0, 1, 1),
    (11, 1, 1, 2),
    (12, 1, 1, 0),
    (13, 1, 2, 0),
]


def test_order_is_the_published_one_bit_for_bit():
    assert reference(GOLDEN_RUN, GOLDEN_WINDOWS) == GOLDEN
    assert all_samples(DataOrder(GOLDEN_RUN, GOLDEN_WINDOWS)) == GOLDEN


@st.composite
def runs(draw) -> tuple[RunConfig, dict[str, int]]:
    """Runs of one to three stages over two to five sources, with ramps, and windows that divide nothing."""
    k = draw(st.integers(2, 5))
    names = "abcde"[:k]
    stages = []
    for i in range(draw(st.integers(1, 3))):
        shares = draw(st.lists(st.integers(0, 20), min_size=k, max_size=k).filter(lambda w: sum(w) > 0))
        samples = draw(st.integers(1, 60))
        mixture = {n: s / 10 for n, s in zip(names, shares, strict=True)}
        stages.append(stage(samples, draw(st.integers(1, 16)), mixture, f"s{i}", draw(st.integers(0, samples))))
    return toy(stages, k, draw(st.integers(0, 2**40))), {n: draw(st.integers(1, 40)) for n in names}


@settings(max_examples=80, derandomize=True, deadline=None)
@given(run=runs())
def test_order_equals_the_slow_reference_in_fractions(run):
    config, windows = run
    try:
        expected = reference(config, windows)
    except Tie:
        assume(False)
    else:
        assert all_samples(DataOrder(config, windows)) == expected


@settings(max_examples=80, derandomize=True, deadline=None)
@given(run=runs())
def test_every_window_comes_once_per_epoch_and_epochs_in_order(run):
    config, windows = run
    order = DataOrder(config, windows)
    rows = all_samples(order)
    assert [r[0] for r in rows] == list(range(len(rows)))
    for i, name in enumerate(order.names):
        mine = [(epoch, window) for _, source, epoch, window in rows if source == i]
        assert len(mine) == consumed(order, config.steps)[name]
        size = windows[name]
        for epoch in range(-(-len(mine) // size)):
            part = mine[epoch * size : (epoch + 1) * size]
            assert {e for e, _ in part} == {epoch}
            seen = [w for _, w in part]
            assert len(set(seen)) == len(seen) and set(seen) <= set(range(size))


# ---- independence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_together_consume_exactly_the_step_and_their_hashes_add_up(world):
    order = DataOrder(toy([stage(64, 16, {"a": 0.7, "b": 0.3})]), {"a": 13, "b": 5})
    for step in (1, 3):
        whole = order.samples(step)
        parts = [rank_slice(whole, rank, world) for rank in range(world)]
        assert np.concatenate([p.n for p in parts]).tolist() == whole.n.tolist()
        assert np.concatenate([p.window for p in parts]).tolist() == whole.window.tolist()
        assert format_hash(sum(map(data_hash, parts))) == format_hash(data_hash(whole))


@pytest.mark.goal("R6", trials=1000)
@settings(max_examples=1000, derandomize=True, deadline=None)
@given(run=runs(), data=st.data())
def test_any_rank_count_and_any_start_give_the_samples_of_an_undisturbed_run(run, data):
    config, windows = run
    sizes = [s.batch_tokens // SEQ for s in config.stages]
    worlds = [w for w in (1, 2, 4, 8) if not any(size % w for size in sizes)]
    world, start = data.draw(st.sampled_from(worlds)), data.draw(st.integers(1, config.steps))
    undisturbed, resumed = DataOrder(config, windows), DataOrder(config, windows)
    undisturbed.samples(1)
    for step in range(start, min(start + 2, config.steps + 1)):
        whole = undisturbed.samples(step)
        parts = [rank_slice(resumed.samples(step), rank, world) for rank in range(world)]
        for column in ("n", "source", "epoch", "window"):
            assert np.concatenate([getattr(p, column) for p in parts]).tolist() == getattr(whole, column).tolist()
        assert format_hash(sum(map(data_hash, parts))) == format_hash(data_hash(whole))
        first = config.tokens_at(step - 1) // SEQ
        assert whole.n.tolist() == list(range(first, first + len(whole)))


def test_ranks_that_do_not_divide_the_batch_are_refused_with_valid_numbers():
    config = toy([stage(24, 24, {}, "one"), stage(12, 12, {}, "two")])
    for world in (1, 2, 3, 4, 6, 12):
        check_ranks(config, world)
    message = (
        r"ranks \(8\) must divide the sequences of a step \(12\) in stage two; nearest .*two.batch_tokens: 32 or 64"
    )
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, 8)


def test_hash_depends_on_every_column_and_not_on_the_order_of_rows():
    samples = DataOrder(toy([stage(16, 16, {"a": 0.7, "b": 0.3})]), {"a": 13, "b": 5}).samples(1)
    whole = data_hash(samples)
    assert data_hash(samples[::-1]) == whole
    for column in ("n", "source", "epoch", "window"):
        changed = getattr(samples, column).copy()
        changed[3] += 1
        assert data_hash(replace(samples, **{column: changed})) != whole
    swapped = samples.window.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert data_hash(replace(samples, window=swapped)) != whole
    assert (format_hash(0), format_hash(2**64 + 255)) == ("0" * 16, "00000000000000ff")


def test_seed_source_and_epoch_each_give_another_permutation():
    def epochs(seed: int) -> list[list[int]]:
        rows = all_samples(DataOrder(toy([stage(120, 6, {"a": 0.5, "b": 0.5})], seed=seed), {"a": 30, "b": 30}))
        return [[w for _, s, e, w in rows if (s, e) == key] for key in ((0, 0), (0, 1), (1, 0))]

    orders = [tuple(o) for seed in (1, 2) for o in epochs(seed)]
    assert len(set(orders)) == 6
    assert all(sorted(o) == list(range(30)) for o in orders)


def test_places_are_spread_evenly_over_windows():
    # 6,000 keys, 6 windows: each of 36 cells is binomial with mean 1000 and deviation 29; 5 deviations allowed
    keys = np.random.default_rng(0).integers(0, 2**63, 6000).astype(np.uint64)
    for place in range(6):
        counts = np.bincount(permute(np.full(6000, place), 6, keys), minlength=6)
        assert np.abs(counts - 1000).max() < 145


@settings(max_examples=60, derandomize=True, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, MASK))
def test_permutation_is_one_to_one_for_any_size_and_key(size, key):
    out = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert np.sort(out).tolist() == list(range(size))


def test_the_last_step_of_a_run_of_trillions_is_exact():
    config = preset("tinyllama_1b")
    windows = {"slimpajama": 300_000_007, "starcoder": 150_000_001}
    order = DataOrder(config, windows)
    last = order.samples(config.steps)
    assert config.steps == 1_430_512
    assert int(last.n[-1]) == 1_430_512 * 1024 - 1
    # n samples times 0.693584, in whole numbers: (2 n 693584 + 10^6) // (2 10^6)
    n = 1_430_512 * 1024
    slimpajama = (2 * n * 693_584 + 10**6) // (2 * 10**6)
    assert consumed(order, config.steps) == {"slimpajama": slimpajama, "starcoder": n - slimpajama}
    for source, (name, count) in enumerate((("slimpajama", slimpajama), ("starcoder", n - slimpajama))):
        row = np.flatnonzero(last.source == source)[-1]
        epoch, place = divmod(count - 1, windows[name])
        assert last.epoch[row] == epoch
        assert last.window[row] == reference_window(config.seed, name, epoch, place, windows[name])


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_steps_outside_the_run_are_refused():
    order = DataOrder(toy([stage(8, 8, {})]), {"a": 1, "b": 1})
    for step in (0, 2):
        with pytest.raises(ConfigError, match=f"step must lie between 1 and 1, .* found {step}"):
            order.samples(step)


def test_a_batch_placed_in_parts_is_the_same(monkeypatch):
    config = toy([stage(90, 45, {"a": 3.0, "b": 1.0, "c": 2.0}, "one"), stage(80, 40, {"c": 1.0}, "two", 30)], 3)
    order = DataOrder(config, dict.fromkeys("abc", 11))
    whole = all_samples(order)
    for chunk in (1, 7, 44):
        monkeypatch.setattr("tinylab.data.order._CHUNK", chunk)
        assert all_samples(order) == whole


def test_the_order_needs_no_torch():
    code = "import sys, tinylab.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
