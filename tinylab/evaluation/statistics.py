"""How sure a score is, and whether two scores differ: intervals, paired tests, families of tests.

Shares and differences are fractions, not percent. Every interval covers the draw of items only, not seeds or data
order. Needs numpy alone, so that published scores can be read without the `evaluate` extra; scipy checks it in tests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BOOTSTRAP_DRAWS = 10_000
BOOTSTRAP_SEED = 20240204
Z95 = NormalDist().inv_cdf(0.975)
"""Standard errors on each side of a normal 95% interval: 1.95996."""


def wilson_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share k/n (Wilson 1927): stays inside [0, 1] and holds near 0, 1 and small n.

    Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k must be between 0 and n, and n at least 1; found k = {k}, n = {n}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, shrink = k / n, 1 + z * z / n
    center = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return (0.0 if k == 0 else center - half), (1.0 if k == n else center + half)


def standard_error(k: int, n: int) -> float:
    """Standard error of a share k/n, sqrt(p (1 - p) / n); that of lm-eval divides by n - 1 instead."""
    return math.sqrt(k * (n - k) / n) / n


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p: 2 P[Bin(only_a + only_b, 1/2) <= min], at most 1; 1 without discordant items.

    `only_a` counts items that only A has right, `only_b` those that only B has right. Summed in exact integers.
    """
    n = only_a + only_b
    term = total = 1
    for i in range(1, min(only_a, only_b) + 1):
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

    def interval(self) -> tuple[float, float]:
        """95% interval of the difference: normal, after half an item is added to each of the four cells.

        Without them it is too short after few flips, and a single point after none (Agresti and Min 2005, doi
        10.1002/sim.1781).
        """
        n, flips, gain = self.n + 2, self.only_a + self.only_b + 1, self.only_b - self.only_a
        half = Z95 * math.sqrt(flips - gain * gain / n) / n
        return gain / n - half, gain / n + half


def paired(right_a: Sequence[bool] | np.ndarray, right_b: Sequence[bool] | np.ndarray) -> Paired:
    """Compare two models item by item; `right_a[i]` and `right_b[i]` belong to the same item.

    d = (c - b) / N and SE = sqrt(b + c - (c - b)^2 / N) / N, with b = only A right, c = only B right.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    n, both, only_a, only_b = len(a), int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum())
    gain = only_b - only_a
    stderr = math.sqrt(max(0.0, only_a + only_b - gain * gain / n)) / n
    neither = n - both - only_a - only_b
    return Paired(n, both, only_a, only_b, neither, gain / n, stderr, mcnemar(only_a, only_b))


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

    `differences` maps a task to its items' B minus A (for accuracies -1, 0 or 1). Resampling n items of few distinct
    values is one multinomial draw of how often each value comes. `stderr` is the closed form
    sqrt(sum of squared task errors) / number of tasks, as a check.
    """
    rng, count = np.random.default_rng(seed), len(differences)
    means, difference, variance = np.zeros(draws), 0.0, 0.0
    for task in sorted(differences):
        items = np.asarray(differences[task], dtype=np.float64)
        values, times = np.unique(items, return_counts=True)
        means += rng.multinomial(len(items), times / len(items), size=draws) @ values / len(items)
        difference += float(items.mean())
        variance += float(items.var()) / len(items)
    low, high = np.quantile(means / count, [0.5 - level / 2, 0.5 + level / 2])
    return MeanDifference(difference / count, float(low), float(high), math.sqrt(variance) / count, draws, seed, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm's step-down procedure, in the given order (Holm 1979).

    The family is everything passed in: print its size beside the result.
    """
    p = np.asarray(p_values, dtype=float)
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return adjusted.tolist()


def unpaired_z(k_a: int, n_a: int, k_b: int, n_b: int) -> float:
    """z of k_b/n_b - k_a/n_a from counts alone, unpooled; weaker than a paired test on the same items.

    For published numbers without items. 0 when both shares are equal and without spread.
    """
    difference = k_b / n_b - k_a / n_a
    spread = math.hypot(standard_error(k_a, n_a), standard_error(k_b, n_b))
    return difference / spread if spread else math.copysign(math.inf, difference) if difference else 0.0
