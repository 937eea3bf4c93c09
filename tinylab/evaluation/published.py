"""Published scores of TinyLlama and Pythia-1.0B: verbatim, with source, rebuilt as counts, oddities flagged.

Nothing here is repaired: where a printed number does not fit, the row says so in `flag`. Which checkpoints they are of
is in catalog/milestones.py.
"""

import math
from dataclasses import dataclass

import pandas

from tinylab.catalog.milestones import PUBLISHED, Milestone
from tinylab.evaluation.statistics import Z95, standard_error, wilson_interval

EVAL_MD = "jzhang38/TinyLlama:EVAL.md @ bf12224"
CARD = "model card of TinyLlama/TinyLlama_v1.1"


@dataclass(frozen=True)
class Benchmark:
    """One of the seven tasks."""

    file: str
    """lm-eval's built-in file, below its tasks/."""
    split: str
    """The split that is scored."""
    n: int
    """Its items."""
    metric: str
    chance: float
    majority: float | None = None
    """Share of the most frequent answer, where it differs from chance."""


BENCHMARKS: dict[str, Benchmark] = {
    "hellaswag": Benchmark("hellaswag/hellaswag.yaml", "validation", 10042, "acc_norm", 0.25),
    "openbookqa": Benchmark("openbookqa/openbookqa.yaml", "test", 500, "acc_norm", 0.25),
    "winogrande": Benchmark("winogrande/default.yaml", "validation", 1267, "acc", 0.5),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "test", 1172, "acc_norm", 0.25),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "test", 2376, "acc_norm", 0.25),
    # "yes" on validation: arXiv 1905.10044
    "boolq": Benchmark("super_glue/boolq/default.yaml", "validation", 3270, "acc", 0.5, 0.6217),
    "piqa": Benchmark("piqa/piqa.yaml", "validation", 1838, "acc_norm", 0.5),
}
"""The seven tasks in the order of EVAL.md."""

MEAN = "commonsense_avg7"
INSTRUCT_EVAL = ("mmlu", "bbh", "humaneval", "drop")

_PERCENT = {
    "Pythia-1.0B": "47.16 31.40 53.43 27.05 48.99 60.83 69.21 48.30 25.70 28.19 1.83 4.25",
    "50k": "43.50 29.80 53.28 24.32 44.91 59.66 67.30 46.11 26.45 28.82 5.49 11.42",
    "240k": "49.56 31.40 55.80 26.54 48.32 56.91 69.42 48.28 26.16 28.83 4.88 12.43",
    "480k": "52.54 33.40 55.96 27.82 52.36 59.54 69.91 50.22 24.65 29.21 6.10 13.03",
    "715k": "53.68 35.20 58.33 29.18 51.89 59.08 71.65 51.29 24.85 28.20 7.93 14.43",
    "955k": "54.63 33.40 56.83 28.07 54.67 63.21 70.67 51.64 25.97 29.07 6.71 13.14",
    "1195k": "58.96 34.40 58.72 31.91 56.78 63.21 73.07 53.86 25.92 29.32 9.15 15.45",
    "1431k": "59.20 36.00 59.12 30.12 55.25 57.83 73.29 52.99",
    "v1.1": "61.47 36.80 59.43 32.68 55.47 55.99 73.56 53.63",
    "v1.1 math_code": "60.80 36.40 60.22 33.87 55.20 57.09 72.69 53.75",
    "v1.1 chinese": "58.23 35.20 59.27 31.40 55.35 61.41 73.01 53.41",
}
"""Percent as printed, by the milestone's title: the seven tasks, their average, and INSTRUCT_EVAL where published."""

_REMARKS = {
    ("955k", "boolq"): "2067/3270 at both 2T and 2.5T: chance or a copied cell",
    ("1195k", "boolq"): "2067/3270 at both 2T and 2.5T: chance or a copied cell",
    ("715k", MEAN): "printed 51.28 in README.md",
    ("50k", MEAN): "tokens printed as 103B, 104b and 105b for this one checkpoint; exactly 104.86B",
    ("1431k", "arc_easy"): "a re-computed cell or a rounding slip",
}


def rebuild_count(percent: str, n: int) -> tuple[int, bool]:
    """The count k nearest to a printed percentage of n items, and whether 100 k/n rounds to what was printed."""
    k = round(float(percent) * n / 100)
    return k, math.isclose(round(100 * k / n, 2), float(percent), abs_tol=1e-9)


def published() -> pandas.DataFrame:
    """One row per model and task.

    Columns: `model` (Hub id), `label`, `step`, `tokens` (exact; v1.1 as printed), `tokens_printed`, `task`, `metric`,
    `printed` (percent, verbatim), `value` (that as a fraction), `k` and `n` (rebuilt count and items; none where the
    table has a score without items), `stderr`, `low`, `high` (Wilson 95%; normal for the mean), `chance`, `baseline`
    (always the frequent answer), `recomputed` (k/n, and for the mean of seven the mean of those), `flag` (what does not
    fit, else ""), `source`.
    """
    known = {m.title: m for m in PUBLISHED if m.printed_tokens is not None}
    return pandas.DataFrame([row for title in _PERCENT for row in _rows(known[title])])


def _rows(milestone: Milestone) -> list[dict[str, object]]:
    printed = _PERCENT[milestone.title].split()
    cells, average, instruct = printed[:7], printed[7], printed[8:]
    rows, shares, errors = [], [], []
    for (task, benchmark), cell in zip(BENCHMARKS.items(), cells, strict=True):
        n = benchmark.n
        k, exact = rebuild_count(cell, n)
        low, high = wilson_interval(k, n)
        shares.append(k / n)
        errors.append(standard_error(k, n))
        flags = [] if exact else [f"no k/{n} gives {cell}; nearest is {k}/{n} = {100 * k / n:.2f}"]
        found = {"k": k, "n": n, "stderr": errors[-1], "low": low, "high": high, "chance": benchmark.chance}
        found |= {"baseline": benchmark.majority, "recomputed": k / n}
        rows.append(_row(milestone, task, benchmark.metric, cell, flags, **found))
    mean, stderr = sum(shares) / len(shares), math.hypot(*errors) / len(errors)
    of_cells = f"{sum(map(float, cells)) / len(cells):.2f}"
    flags = [] if of_cells == average else [f"printed {average}; the row's mean is {of_cells}"]
    found = {"stderr": stderr, "low": mean - Z95 * stderr, "high": mean + Z95 * stderr, "recomputed": mean}
    found["chance"] = sum(b.chance for b in BENCHMARKS.values()) / len(BENCHMARKS)
    rows.append(_row(milestone, MEAN, "mean", average, flags, **found))
    for task, cell in zip(INSTRUCT_EVAL, instruct, strict=False):
        rows.append(_row(milestone, task, "score", cell, [], chance=0.25 if task == "mmlu" else None))
    return rows


def _row(
    milestone: Milestone, task: str, metric: str, cell: str, flags: list[str], **found: object
) -> dict[str, object]:
    """A row of the table. `found` is what could be rebuilt; a task without items has none of it."""
    remark = _REMARKS.get((milestone.title, task))  # what is known by reading follows what arithmetic found
    return {
        "model": milestone.repository,
        "label": milestone.title,
        "step": milestone.step,
        "tokens": milestone.tokens,
        "tokens_printed": milestone.printed_tokens,
        "source": CARD if milestone.step is None else EVAL_MD,
        "task": task,
        "metric": metric,
        "printed": cell,
        "value": round(float(cell) / 100, 6),
        **dict.fromkeys(("k", "n", "stderr", "low", "high", "chance", "baseline", "recomputed")),
        **found,
        "flag": "; ".join([*flags, remark] if remark else flags),
    }
