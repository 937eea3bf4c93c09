"""Is a series of points a path? Finds the points that are out of place, or that belong to another path.

Rule of the middle. Of three checkpoints in order, the middle one is nearer to both others than they are to each other:
along a random walk squared distances add up, along a straight line distances do, and training is between the two. So
`bend(i, j, k) = max(d(i,j), d(j,k)) / d(i,k)` is at most 1 for any three checkpoints of a clean series, even once it
has settled into noise (all distances are then equal). Swapped neighbours have bends of 1.4 to 2, a foreign checkpoint
far larger ones.

Any three points whose bend exceeds LIMIT break the rule. The point with the largest share of the excess is removed and
the rest is judged again, until no such three are left: one false point bends many others and must not take them with
it. Each removed point is then tried at every place. If it fits at another, it was swapped or misplaced; if it fits
nowhere, it is foreign. The first and the last point are never the middle of three, so they have a rule of their own:
such a point is foreign if it is about as far from its neighbour as from the next one (ratio above 0.97) and points in
a direction unrelated to all others (cosines below 0.03).

Not detected: two swapped checkpoints that are less than a tenth as far from each other as from their neighbours, a
foreign first or last checkpoint from a run with the same initial weights, and anything in a series of two. A real jump
and return in training (a spike, a cyclic learning rate) is reported like a foreign checkpoint, for a person to judge.
"""

from dataclasses import dataclass

import numpy as np

LIMIT = 1.1
"""Largest bend on a path. Sampling 5,000 values of each matrix moves a bend by about 0.01."""
_FLAT = 0.97
_UNRELATED = 0.03


@dataclass(frozen=True)
class Finding:
    """Point `index` is out of place: it fits between `after` and `before`, or nowhere (`fits` is False)."""

    index: int
    bend: float
    """Its largest bend as the middle of three points; 0 for the first and the last point."""
    fits: bool
    after: int | None
    before: int | None


def find_strays(distance: np.ndarray, cosine: np.ndarray) -> tuple[list[Finding], list[int]]:
    """The points that break the order of the rows, and the corrected order of all points that belong to the path.

    distance, cosine: (n, n), between checkpoints (analysis/fingerprint.py).
    """
    kept = list(range(len(distance)))
    strays: list[int] = []
    while len(kept) > 2:
        excess = _excess(distance, kept)
        share = excess.sum((1, 2)) + excess.sum((0, 2)) + excess.sum((0, 1))  # what involves each point
        for end in (0, -1):
            if _is_unrelated_end(distance, cosine, kept, end):
                share[end] = np.inf
        worst = int(np.argmax(share))
        if share[worst] <= 0:
            break
        strays.append(kept.pop(worst))
    order, findings = list(kept), []
    for index in reversed(strays):
        path = sorted([*kept, index])
        bend = float(_bend_cube(distance, path)[:, path.index(index), :].max())
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
    """By how much `path` breaks the rule of the middle: the sum of what bends have above LIMIT; 0 for a clean path."""
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


def _best_place(distance: np.ndarray, path: list[int], point: int) -> int | None:
    """The place in `path` where the point fits nearest to its neighbours; None if it fits nowhere."""
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
    """The violation that `point` would add at each place of `path`, over all threes that include it."""
    d, p = distance[np.ix_(path, path)], distance[point, path]
    rows, columns, ordered = p[:, None], p[None, :], np.triu(np.ones_like(d, dtype=bool), 1)

    def excess(longer: np.ndarray, across: np.ndarray) -> np.ndarray:
        return np.where(ordered, np.maximum(longer / np.maximum(across, 1e-12) - LIMIT, 0.0), 0.0)

    first = excess(np.maximum(rows, d), columns)
    middle = excess(np.maximum(rows, columns), d)
    last = excess(np.maximum(d, columns), rows)
    return [float(first[at:, at:].sum() + middle[:at, at:].sum() + last[:at, :at].sum()) for at in range(len(path) + 1)]


def _is_unrelated_end(distance: np.ndarray, cosine: np.ndarray, path: list[int], end: int) -> bool:
    """Whether an end of `path` (0 or -1) is as far from its neighbour as from the next point, and unrelated to all."""
    point, others = path[end], path[1:] if end == 0 else path[:-1]
    near, far = (others[0], others[1]) if end == 0 else (others[-1], others[-2])
    is_flat = distance[point, near] > _FLAT * distance[point, far]
    return bool(is_flat and cosine[point, others].max() < _UNRELATED)
