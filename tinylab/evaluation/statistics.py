"""How sure a score is, and whether two scores differ: intervals, paired tests, families of tests.

Shares and differences are fractions, not percent. Every interval covers the draw of items only, not seeds or data
order. Written against scipy (tests), which this module does not import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 20240204
_CELLS_AT_ONCE = 2_000_000
"""Resampled items held at once by the bootstrap: 16 MB of int64 whatever the number of items."""


def normal_quantile(level: float) -> float:
    """z with P(|N(0, 1)| <= z) = level; 1.95996 for 0.95."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share k/n (Wilson 1927): stays inside [0, 1] and holds near 0, 1 and small n.

    Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k must lie between 0 and n, and n be at least 1; found k = {k}, n = {n}")
    z = normal_quantile(level)
    p, shrink = k / n, 1 + z * z / n
    center = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return (0.0 if k == 0 else center - half), (1.0 if k == n else center + half)


def standard_error(k: int, n: int) -> float:
    """Standard error of a share k/n, sqrt(p (1 - p) / n); that of lm-eval divides by n - 1 instead."""
    return math.sqrt(k * (n - k) / n) / n


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p: 2 P[Bin(only_a + only_b, 1/2) <= min], at most 1; 1 without discordant items.

    `only_a` counts items that only A has right, `only_b` those that only B has. Summed in exact integers.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    if least < 0:
        raise ValueError(f"counts must be at least 0; found {only_a} and {only_b}")
    term = total = 1
    for i in range(1, least + 1):
        term = term * (n - i + 1) // i
        total += term
    return min(1.0, 2 * total / 2**n)


@dataclass(frozen=True)
class Paired:
    """B minus A on the same items: the 2 x 2 table, the difference with its standard error, and McNemar's p."""

    n: int
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    stderr: float
    p: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Interval of the difference: normal, after half an item is added to each of the four cells.

        Without them few flips make it too short, and none a point (Agresti and Min 2005, doi 10.1002/sim.1781).
        """
        n, flips, gain = self.n + 2, self.only_a + self.only_b + 1, self.only_b - self.only_a
        half = normal_quantile(level) * math.sqrt(flips - gain * gain / n) / n
        return gain / n - half, gain / n + half


def paired(right_a: Sequence[bool] | np.ndarray, right_b: Sequence[bool] | np.ndarray) -> Paired:
    """Compare two models item by item; `right_a[i]` and `right_b[i]` belong to the same item.

    d = (c - b) / N and SE = sqrt(b + c - (c - b)^2 / N) / N, with b = only A right, c = only B right.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"both models need one answer per item, at least one item; found {a.shape} and {b.shape}")
    n = len(a)
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum())
    gain = only_b - only_a
    stderr = math.sqrt(max(0.0, only_a + only_b - gain * gain / n)) / n
    return Paired(
        n=n,
        both=both,
        only_a=only_a,
        only_b=only_b,
        neither=n - both - only_a - only_b,
        difference=gain / n,
        stderr=stderr,
        p=mcnemar(only_a, only_b),
    )


@dataclass(frozen=True)
class MeanDifference:
    """B minus A in the plain mean over tasks: percentile interval of the bootstrap, closed-form standard error."""

    difference: float
    low: float
    high: float
    stderr: float
    draws: int
    seed: int
    level: float


def bootstrap_mean(
    differences: Mapping[str, Sequence[float] | np.ndarray],
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = BOOTSTRAP_SEED,
    level: float = 0.95,
) -> MeanDifference:
    """Paired bootstrap of the mean over tasks; items are resampled within each task, both models on the same draw.

    `differences` maps a task to its items' B minus A (for accuracies -1, 0 or 1). Memory is bounded: a block of draws
    at a time. `stderr` is the closed form sqrt(sum of squared task errors) / number of tasks, as a check.
    """
    if not differences or any(len(d) == 0 for d in differences.values()):
        raise ValueError("each task needs at least one item, and there must be at least one task")
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    variance = 0.0
    for task in sorted(differences):
        items = np.asarray(differences[task], dtype=np.float64)
        means += _resampled_means(items, draws, rng)
        variance += float(items.var()) / len(items)
    count = len(differences)
    low, high = np.quantile(means / count, [0.5 - level / 2, 0.5 + level / 2])
    return MeanDifference(
        difference=float(np.mean([np.mean(np.asarray(d, dtype=np.float64)) for d in differences.values()])),
        low=float(low),
        high=float(high),
        stderr=math.sqrt(variance) / count,
        draws=draws,
        seed=seed,
        level=level,
    )


def _resampled_means(items: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `draws` resamples of `items` with replacement.

    Resampling n items of few distinct values is one multinomial draw of how often each value comes.
    """
    values, counts = np.unique(items, return_counts=True)
    if len(values) <= 16:
        return rng.multinomial(len(items), counts / len(items), size=draws) @ values / len(items)
    block = max(1, _CELLS_AT_ONCE // len(items))
    means = np.empty(draws)
    for start in range(0, draws, block):
        stop = min(start + block, draws)
        means[start:stop] = items[rng.integers(0, len(items), (stop - start, len(items)))].mean(axis=1)
    return means


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm's step-down procedure, in the given order (Holm 1979).

    The family is everything passed in: print its size beside the result.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(order), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def unpaired_z(k_a: int, n_a: int, k_b: int, n_b: int) -> float:
    """z of k_b/n_b - k_a/n_a from counts alone, unpooled; weaker than a paired test on the same items.

    For published numbers without items. 0 when both shares are equal and without spread.
    """
    difference = k_b / n_b - k_a / n_a
    spread = math.hypot(standard_error(k_a, n_a), standard_error(k_b, n_b))
    if spread == 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / spread


def normal_p(z: float) -> float:
    """Two-sided p of a standard normal z."""
    return math.erfc(abs(z) / math.sqrt(2))


def items_needed(discordant: float, difference: float, level: float = 0.95, power: float = 0.8) -> int:
    """Items for a paired test to find `difference` with probability `power` when a share `discordant` of items flips.

    n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, psi the discordant share (Connor 1987, doi 10.2307/2531961).
    Raises ValueError unless 0 < |difference| <= discordant <= 1.
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError(
            "the difference must not be 0 nor exceed the discordant share, itself at most 1; "
            f"found a difference of {difference} and a share of {discordant}"
        )
    z_level, z_power = normal_quantile(level), NormalDist().inv_cdf(power)
    root = z_level * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference**2)
    return math.ceil((root / difference) ** 2)
