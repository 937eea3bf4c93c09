"""Is a series of points a path? Finds the points that stand at the wrong place, or belong to another path.

Rule of the middle. Of three checkpoints in order, the middle one lies nearer to both others than these to each
other: squared distances add up along a random walk, distances along a straight line, and training is between the
two. So `bend(i, j, k) = max(d(i,j), d(j,k)) / d(i,k)` is at most 1 for any three of a clean series, also where it has
settled into noise (then all distances are equal). A swapped neighbour gives 1.4 to 2, a foreign checkpoint far more.

Every three whose bend exceeds LIMIT is a violation. The point with the largest share in all of them is taken out, and
the rest is judged again, until none is left: one false point bends many others, and must not take them with it. Then
each point taken out is tried at every place. If it fits at another, it was swapped or misplaced; if nowhere, it is
foreign. A first or last point is in the middle of no three. It is foreign if it is as far from its neighbour as from
the one behind that (ratio above 0.97) and points nowhere near any other (cosines below 0.03).

What this cannot see: two swapped checkpoints whose distance is less than a tenth of that to their neighbours, a
foreign first or last checkpoint from a run with the same initial weights, and a series of two. A jump and return of the
training itself (a spike, a cyclic learning rate) is reported like a foreign checkpoint, for a person to judge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LIMIT = 1.1
"""Largest bend on a path. Sampling 5,000 values of each matrix moves a bend by about 0.01."""
_FLAT = 0.97
_UNRELATED = 0.03


@dataclass(frozen=True)
class Finding:
    """Point `index` is off the path: it fits between `after` and `before`, or nowhere (`fits` is false)."""

    index: int
    bend: float
    """The largest bend of any three that it is the middle of; 0 for an end."""
    fits: bool
    after: int | None
    before: int | None


def find_strays(distance: np.ndarray, cosine: np.ndarray) -> tuple[list[Finding], list[int]]:
    """Points off the path given by the order of the rows, and the order in which those that belong to it lie."""
    kept = list(range(len(distance)))
    strays: list[int] = []
    while len(kept) > 2:
        share = _shares(distance, kept)
        for end in (0, -1):
            if _is_unrelated_end(distance, cosine, kept, end):
                share[end] = np.inf
        worst = int(np.argmax(share))
        if share[worst] <= 0:
            break
        strays.append(kept.pop(worst))
    order, findings = list(kept), []
    for index in reversed(strays):
        bend = _largest_bend(distance, sorted([*kept, index]), index)
        place = _best_place(distance, kept, index)
        if place is None:
            findings.append(Finding(index, bend, False, None, None))
            continue
        after, before = (kept[place - 1] if place else None), (kept[place] if place < len(kept) else None)
        findings.append(Finding(index, bend, True, after, before))
        among = _best_place(distance, order, index)
        if among is not None:
            order.insert(among, index)
    return sorted(findings, key=lambda f: f.index), order


def violation(distance: np.ndarray, path: list[int]) -> float:
    """How far `path` is from keeping the rule of the middle: the sum of all bends above LIMIT; 0 for a clean one."""
    return float(_excess(distance, path).sum())


def bends(distance: np.ndarray) -> list[float]:
    """The bend of every point with its two neighbours: at most about 1 on a path; 0 at the ends."""
    n = len(distance)
    inner = [max(distance[i - 1, i], distance[i, i + 1]) / max(distance[i - 1, i + 1], 1e-12) for i in range(1, n - 1)]
    return [0.0, *map(float, inner), 0.0][:n]


def _bend_cube(distance: np.ndarray, path: list[int]) -> np.ndarray:
    """bend(i, j, k) for all places i < j < k of `path`, 0 elsewhere; (n, n, n)."""
    d = distance[np.ix_(path, path)]
    cube = np.maximum(d[:, :, None], d[None, :, :]) / np.maximum(d[:, None, :], 1e-12)
    at = np.arange(len(path))
    ordered = (at[:, None, None] < at[None, :, None]) & (at[None, :, None] < at[None, None, :])
    return np.where(ordered, cube, 0.0)


def _excess(distance: np.ndarray, path: list[int]) -> np.ndarray:
    return np.maximum(_bend_cube(distance, path) - LIMIT, 0.0)


def _shares(distance: np.ndarray, path: list[int]) -> np.ndarray:
    """How much of the violation would go with each point of `path`."""
    excess = _excess(distance, path)
    return excess.sum((1, 2)) + excess.sum((0, 2)) + excess.sum((0, 1))


def _largest_bend(distance: np.ndarray, path: list[int], point: int) -> float:
    return float(_bend_cube(distance, path)[:, path.index(point), :].max())


def _best_place(distance: np.ndarray, path: list[int], point: int) -> int | None:
    """Where in `path` the point fits with the least detour; None if it fits nowhere."""
    if len(path) < 2:
        return None
    fitting = []
    for place, added in enumerate(_added(distance, path, point)):
        if added > 1e-9:
            continue
        if place in (0, len(path)):
            near, far = (path[0], path[1]) if place == 0 else (path[-1], path[-2])
            if distance[point, near] > _FLAT * distance[point, far]:
                continue
        neighbours = path[max(place - 1, 0) : place + 1]
        fitting.append((float(distance[point, neighbours].mean()), place))
    return min(fitting)[1] if fitting else None


def _added(distance: np.ndarray, path: list[int], point: int) -> list[float]:
    """The violation that `point` would add at each place of `path`, from all threes that it would be part of."""
    d, p = distance[np.ix_(path, path)], distance[point, path]
    rows, columns, ordered = p[:, None], p[None, :], np.triu(np.ones_like(d, dtype=bool), 1)

    def excess(longer: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(ordered, np.maximum(longer / np.maximum(whole, 1e-12) - LIMIT, 0.0), 0.0)

    first = excess(np.maximum(rows, d), columns)
    middle = excess(np.maximum(rows, columns), d)
    last = excess(np.maximum(d, columns), rows)
    return [float(first[at:, at:].sum() + middle[:at, at:].sum() + last[:at, :at].sum()) for at in range(len(path) + 1)]


def _is_unrelated_end(distance: np.ndarray, cosine: np.ndarray, path: list[int], end: int) -> bool:
    """Whether the first (0) or last (-1) point of `path` is no nearer to its neighbour than farther on, and alone."""
    point, others = path[end], path[1:] if end == 0 else path[:-1]
    near, far = (others[0], others[1]) if end == 0 else (others[-1], others[-2])
    is_flat = distance[point, near] > _FLAT * distance[point, far]
    return bool(is_flat and cosine[point, others].max() < _UNRELATED)
