"""Intervals and tests against textbook values, scipy, brute force and small simulations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tinylab.evaluation.statistics import (
    Z95,
    bootstrap_mean,
    holm,
    mcnemar,
    paired,
    standard_error,
    unpaired_z,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_table_of_newcombe_1998(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (3, 7), (50, 200), (200, 200)])
def test_wilson_interval_equals_scipy(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.9, method="wilson")
    assert wilson_interval(k, n, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_covers_as_stated():
    """Exact coverage, summed over all k, averaged over shares: Wilson's is 95% within a point from n = 30 on."""
    n, shares = 40, np.linspace(0.1, 0.9, 81)
    bounds = [wilson_interval(k, n) for k in range(n + 1)]
    coverage = [
        sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(bounds) if low <= p <= high)
        for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


def test_wilson_interval_refuses_more_successes_than_items():
    with pytest.raises(ValueError, match="k must be between 0 and n"):
        wilson_interval(3, 2)


def test_mcnemar_equals_the_binomial_test_of_scipy():
    for b, c in itertools.product((0, 1, 2, 5, 13, 40, 300), repeat=2):
        expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9), (b, c)


def test_mcnemar_equals_a_sum_over_all_sign_patterns():
    for b, c in ((1, 4), (3, 5), (0, 6), (4, 4)):
        n = b + c
        extreme = sum(abs(2 * sum(s) - n) >= abs(b - c) for s in itertools.product((0, 1), repeat=n))
        assert mcnemar(b, c) == pytest.approx(extreme / 2**n)


def test_mcnemar_is_never_below_uniform_under_the_null():
    """P(p <= alpha) <= alpha exactly, for every alpha, at any number of discordant items."""
    for n in (1, 7, 20, 33):
        p_values = [mcnemar(b, n - b) for b in range(n + 1)]
        for alpha in (0.01, 0.05, 0.2, 0.5):
            reached = sum(math.comb(n, b) for b, p in enumerate(p_values) if p <= alpha) / 2**n
            assert reached <= alpha


def test_paired_table_difference_and_error_match_the_plain_sample_formulas():
    rng = np.random.default_rng(3)
    a, b = rng.random(500) < 0.4, rng.random(500) < 0.5
    result, back = paired(a, b), paired(b, a)
    difference = b.astype(float) - a
    assert result.difference == pytest.approx(difference.mean())
    assert result.stderr == pytest.approx(difference.std() / math.sqrt(500))
    assert result.both + result.only_a + result.only_b + result.neither == result.n == 500
    assert (back.difference, back.p, back.stderr) == (-result.difference, result.p, result.stderr)


def test_paired_interval_of_hellaswag_with_a_tenth_discordant_is_as_published():
    """The design page's arithmetic: 10% discordant items of 10042 resolve 0.62 points."""
    flips = round(0.1 * 10042)
    a = np.zeros(10042, dtype=bool)
    b = a.copy()
    a[: flips // 2], b[flips // 2 : flips] = True, True
    low, high = paired(a, b).interval()
    assert (high - low) / 2 == pytest.approx(0.0062, abs=5e-5)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.001, 0.01), (0.005, 0.005), (0.02, 0.05), (0.05, 0.3)])
def test_paired_interval_covers_as_stated_with_few_flips_and_with_many(p_a, p_b):
    """Exact, summed over all tables: the plain normal interval covers 0.86 in the first case."""
    n = 200
    lost, won = np.meshgrid(np.arange(n // 2 + 1), np.arange(n // 2 + 1), indexing="ij")
    weights = stats.multinomial.pmf(np.stack([lost, won, n - lost - won], axis=-1), n, [p_a, p_b, 1 - p_a - p_b])
    covered = 0.0
    for b, c in zip(*np.nonzero(weights > 1e-9), strict=True):
        low, high = paired(np.arange(n) < b, np.arange(n) >= n - c).interval()
        covered += weights[b, c] * (low <= p_b - p_a <= high)
    assert covered >= 0.945


def test_a_normal_interval_of_95_percent_reaches_as_far_as_scipys():
    assert pytest.approx(stats.norm.ppf(0.975), rel=1e-14) == Z95


def test_no_flip_among_few_items_is_no_proof_of_equality():
    low, high = paired([True] * 20, [True] * 20).interval()
    assert low == -high and high > 0.05


def test_identical_answers_give_no_difference_and_p_of_one():
    result = paired([True, False, True], [True, False, True])
    assert (result.difference, result.stderr, result.p) == (0.0, 0.0, 1.0)


def test_bootstrap_of_the_mean_agrees_with_its_closed_form():
    rng = np.random.default_rng(1)
    items = {"few": rng.integers(-1, 2, 300), "many": rng.normal(0.1, 1, 400)}
    result = bootstrap_mean(items)
    assert result.difference == pytest.approx(np.mean([items["few"].mean(), items["many"].mean()]))
    half = Z95 * result.stderr
    assert result.high - result.low == pytest.approx(2 * half, rel=0.05)  # 10,000 draws: quantile noise about 2%
    assert result == bootstrap_mean(items), "the seed is fixed"


def test_multinomial_shortcut_has_the_distribution_of_plain_resampling():
    """Three items -1, 0, 1: the 27 equally likely resamples give the exact law of the mean."""
    exact = np.array([np.mean(s) for s in itertools.product((-1, 0, 1), repeat=3)])
    result = bootstrap_mean({"t": [-1, 0, 1]}, draws=20_000, level=0.5)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(exact, [0.25, 0.75])))


def test_bootstrap_interval_covers_as_stated():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        items = rng.choice([-1, 0, 1], size=200, p=[0.1, 0.75, 0.15])
        result = bootstrap_mean({"t": items}, draws=1000)
        hits += result.low <= 0.05 <= result.high
    assert 180 <= hits <= 199  # Bin(200, 0.95): outside with probability below 0.4%


def test_holm_equals_the_textbook_and_the_closed_test_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(5)
    for _ in range(20):
        p = rng.random(4) ** 3
        # Holm is the closed test with Bonferroni on every intersection: adjusted p = the largest over all subsets.
        closed = [
            max(
                min(1.0, len(s) * min(p[j] for j in s))
                for r in range(1, 5)
                for s in itertools.combinations(range(4), r)
                if i in s
            )
            for i in range(4)
        ]
        assert holm(p) == pytest.approx(closed)
    assert holm([]) == []


def test_unpaired_z_finds_the_published_changes_from_counts():
    """The design page, section 4: 2.5T to 3T, BoolQ -4.46 and HellaSwag +0.35."""
    assert unpaired_z(2067, 3270, 1891, 3270) == pytest.approx(-4.46, abs=0.005)
    assert unpaired_z(5921, 10042, 5945, 10042) == pytest.approx(0.35, abs=0.01)  # the page rounded percentages first
    assert unpaired_z(0, 5, 0, 9) == 0.0
    assert standard_error(5945, 10042) == pytest.approx(0.0049, abs=5e-5)
