"""Which scores moved between neighbouring milestones, and what moved their mean."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tinylab.evaluation.paired import compare_records
from tinylab.evaluation.records import Record, Scores
from tinylab.evaluation.statistics import holm, normal_p, unpaired_z

if TYPE_CHECKING:
    import pandas


def own_moves(store: Any, alpha: float = 0.05) -> pandas.DataFrame:
    """One row per task and pair of neighbouring checkpoints of a store, joined item by item.

    Neighbours are the nearest two scored on the same items under one profile, task by task.
    Columns: `task, from, to` (labels), `tokens` (after), `change, low, high` (fractions), `right to wrong`,
    `wrong to right`, `p` (exact McNemar), `p_holm` (over the whole table), `significant` (p_holm < alpha).
    """
    import pandas

    series: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in Scores(store).records():
        if record.header.get("tokens") is not None:
            key = record.key
            series.setdefault((key.task, key.version, key.profile, key.items), []).append(record)
    rows = []
    for before, after in (pair for records in series.values() for pair in pairwise(records)):
        (row,) = compare_records([before], [after]).rows()
        rows.append(
            {"task": row["task"], "from": before.header["label"], "to": after.header["label"]}
            | {"tokens": after.header["tokens"], "change": row["difference"], "low": row["low"]}
            | {"high": row["high"], "right to wrong": row["only_a"], "wrong to right": row["only_b"], "p": row["p"]}
        )
    rows.sort(key=lambda row: (row["task"], row["tokens"]))
    return pandas.DataFrame(_with_holm(rows, alpha))


def published_moves(table: pandas.DataFrame, alpha: float = 0.05) -> pandas.DataFrame:
    """Neighbouring milestones of TinyLlama v1.0 by an unpaired z on rebuilt counts: weaker than pairs of items.

    `table` is `published()`. Columns as in `own_moves`, without the counts of items that changed side.
    """
    import pandas

    known: Any = table[table["n"].notna() & table["label"].str.endswith("k")]
    known = known.sort_values("tokens")
    rows = []
    for task, group in known.groupby("task", sort=False):
        records = group.to_dict("records")
        for a, b in pairwise(records):
            z = unpaired_z(int(a["k"]), int(a["n"]), int(b["k"]), int(b["n"]))
            change, half = b["k"] / b["n"] - a["k"] / a["n"], 1.96 * (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5
            rows.append(
                {"task": task, "from": a["label"], "to": b["label"], "tokens": b["tokens"], "change": change}
                | {"low": change - half, "high": change + half, "p": normal_p(z)}
            )
    return pandas.DataFrame(_with_holm(rows, alpha))


def mean_contributions(table: pandas.DataFrame, before: str, after: str) -> pandas.DataFrame:
    """What moved the mean over tasks between two labels: each task's change and its share of the mean's change.

    Columns: `task, before, after` (percent), `change` and `of the mean` (points); the last row is the mean itself.
    Uses the rows with a count (`k` of `n`), so the mean is that of the rebuilt scores.
    """
    import pandas

    known: Any = table[table["n"].notna() & table["label"].isin([before, after])]
    wide: Any = {
        label: group.set_index("task")["k"] / group.set_index("task")["n"] for label, group in known.groupby("label")
    }
    rows = []
    for task in wide[before].index.intersection(wide[after].index):
        a, b = 100 * float(wide[before][task]), 100 * float(wide[after][task])
        rows.append({"task": task, "before": a, "after": b, "change": b - a})
    for row in rows:
        row["of the mean"] = row["change"] / len(rows)
    mean = {k: sum(r[k] for r in rows) / len(rows) for k in ("before", "after", "change")}
    rows.sort(key=lambda r: -abs(r["change"]))
    return pandas.DataFrame([*rows, {"task": "mean", **mean, "of the mean": mean["change"]}])


def _with_holm(rows: list[dict[str, Any]], alpha: float) -> list[dict[str, Any]]:
    adjusted = holm([row["p"] for row in rows]) if rows else []
    return [row | {"p_holm": p, "significant": p < alpha} for row, p in zip(rows, adjusted, strict=True)]
