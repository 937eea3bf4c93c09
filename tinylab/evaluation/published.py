"""Published scores of TinyLlama and Pythia-1.0B: verbatim, with source, rebuilt as counts, oddities flagged.

Nothing here is repaired: where a printed number does not fit, the row says so in `flag`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinylab.config.schema import STEP_TOKENS
from tinylab.evaluation.statistics import standard_error, wilson_interval

if TYPE_CHECKING:
    import pandas

EVAL_MD = "jzhang38/TinyLlama:EVAL.md @ bf12224"
CARD = "model card of TinyLlama/TinyLlama_v1.1"


@dataclass(frozen=True)
class Benchmark:
    """One of the seven tasks: items of the split that is scored, its metric, and chance."""

    n: int
    metric: str
    chance: float
    majority: float | None = None
    """Share of the most frequent answer, where it differs from chance."""


BENCHMARKS: dict[str, Benchmark] = {
    "hellaswag": Benchmark(10042, "acc_norm", 0.25),
    "openbookqa": Benchmark(500, "acc_norm", 0.25),
    "winogrande": Benchmark(1267, "acc", 0.5),
    "arc_challenge": Benchmark(1172, "acc_norm", 0.25),
    "arc_easy": Benchmark(2376, "acc_norm", 0.25),
    "boolq": Benchmark(3270, "acc", 0.5, 0.6217),  # "yes" on validation: arXiv 1905.10044
    "piqa": Benchmark(1838, "acc_norm", 0.5),
}
"""The seven tasks in the order of EVAL.md; splits and sizes as lm-eval reads them."""

MEAN = "commonsense_avg7"
INSTRUCT_EVAL = ("mmlu", "bbh", "humaneval", "drop")


@dataclass(frozen=True)
class _Row:
    """One line of a published table: percent as printed, in the order of BENCHMARKS, then the average."""

    model: str
    label: str
    step: int | None
    printed_tokens: str
    percent: str
    source: str = EVAL_MD
    instruct: str = ""


_ROWS = (
    _Row(
        "EleutherAI/pythia-1b", "Pythia-1.0B", 143_000, "300B",
        "47.16 31.40 53.43 27.05 48.99 60.83 69.21 48.30", instruct="25.70 28.19 1.83 4.25",
    ),
    _Row(
        "PY007/TinyLlama-1.1B-step-50K-105b", "50k", 50_000, "103B",
        "43.50 29.80 53.28 24.32 44.91 59.66 67.30 46.11", instruct="26.45 28.82 5.49 11.42",
    ),
    _Row(
        "PY007/TinyLlama-1.1B-intermediate-step-240k-503b", "240k", 240_000, "503B",
        "49.56 31.40 55.80 26.54 48.32 56.91 69.42 48.28", instruct="26.16 28.83 4.88 12.43",
    ),
    _Row(
        "PY007/TinyLlama-1.1B-intermediate-step-480k-1T", "480k", 480_000, "1007B",
        "52.54 33.40 55.96 27.82 52.36 59.54 69.91 50.22", instruct="24.65 29.21 6.10 13.03",
    ),
    _Row(
        "PY007/TinyLlama-1.1B-intermediate-step-715k-1.5T", "715k", 715_000, "1.5T",
        "53.68 35.20 58.33 29.18 51.89 59.08 71.65 51.29", instruct="24.85 28.20 7.93 14.43",
    ),
    _Row(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-955k-token-2T", "955k", 955_000, "2T",
        "54.63 33.40 56.83 28.07 54.67 63.21 70.67 51.64", instruct="25.97 29.07 6.71 13.14",
    ),
    _Row(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1195k-token-2.5T", "1195k", 1_195_000, "2.5T",
        "58.96 34.40 58.72 31.91 56.78 63.21 73.07 53.86", instruct="25.92 29.32 9.15 15.45",
    ),
    _Row(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "1431k", 1_430_512, "3T",
        "59.20 36.00 59.12 30.12 55.25 57.83 73.29 52.99",
    ),
    _Row(
        "TinyLlama/TinyLlama_v1.1", "v1.1", None, "2T",
        "61.47 36.80 59.43 32.68 55.47 55.99 73.56 53.63", source=CARD,
    ),
    _Row(
        "TinyLlama/TinyLlama_v1.1_math_code", "v1.1 math_code", None, "2T",
        "60.80 36.40 60.22 33.87 55.20 57.09 72.69 53.75", source=CARD,
    ),
    _Row(
        "TinyLlama/TinyLlama_v1.1_chinese", "v1.1 chinese", None, "2T",
        "58.23 35.20 59.27 31.40 55.35 61.41 73.01 53.41", source=CARD,
    ),
)  # fmt: skip

_EXACT_V1_1 = 2_000_000_000_000
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
    table gives a score without items), `stderr`, `low`, `high` (Wilson 95%; normal for the mean), `chance`, `baseline`
    (always the frequent answer), `recomputed` (k/n, and for the mean of seven the mean of those), `flag` (what does not
    fit, else ""), `source`.
    """
    import pandas

    return pandas.DataFrame([record for row in _ROWS for record in _records(row)])


def _records(row: _Row) -> list[dict[str, object]]:
    *cells, average = row.percent.split()
    records, shares, errors = [], [], []
    for (task, benchmark), printed in zip(BENCHMARKS.items(), cells, strict=True):
        n = benchmark.n
        k, exact = rebuild_count(printed, n)
        low, high = wilson_interval(k, n)
        shares.append(k / n)
        errors.append(standard_error(k, n))
        flags = [] if exact else [f"no k/{n} gives {printed}; nearest is {k}/{n} = {100 * k / n:.2f}"]
        found = {"k": k, "n": n, "stderr": errors[-1], "low": low, "high": high, "chance": benchmark.chance}
        found["baseline"] = benchmark.majority
        records.append(_record(row, task, benchmark.metric, printed, flags, **found, recomputed=k / n))
    mean, stderr = sum(shares) / len(shares), math.hypot(*errors) / len(errors)
    of_cells = f"{sum(map(float, cells)) / len(cells):.2f}"
    flags = [] if of_cells == average else [f"printed {average}; the row's mean is {of_cells}"]
    found = {"stderr": stderr, "low": mean - 1.96 * stderr, "high": mean + 1.96 * stderr, "recomputed": mean}
    chance = sum(b.chance for b in BENCHMARKS.values()) / len(BENCHMARKS)
    records.append(_record(row, MEAN, "mean", average, flags, **found, chance=chance))
    for task, printed in zip(INSTRUCT_EVAL, row.instruct.split(), strict=bool(row.instruct)):
        records.append(_record(row, task, "score", printed, [], chance=0.25 if task == "mmlu" else None))
    return records


def _record(row: _Row, task: str, metric: str, printed: str, flags: list[str], **found: object) -> dict[str, object]:
    """A row of the table. `found` is what could be rebuilt; a task without items has none of it."""
    remark = _REMARKS.get((row.label, task))  # after what was found by arithmetic, what is known by reading
    return {
        "model": row.model,
        "label": row.label,
        "step": row.step,
        "tokens": _EXACT_V1_1 if row.step is None else row.step * STEP_TOKENS,
        "tokens_printed": row.printed_tokens,
        "source": row.source,
        "task": task,
        "metric": metric,
        "printed": printed,
        "value": round(float(printed) / 100, 6),
        **dict.fromkeys(("k", "n", "stderr", "low", "high", "chance", "baseline", "recomputed")),
        **found,
        "flag": "; ".join([*flags, remark] if remark else flags),
    }
