"""Which scores moved between neighbouring milestones, and what moved their mean."""

from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pandas

from tinylab.evaluation.paired import compare_records
from tinylab.evaluation.records import Record
from tinylab.evaluation.scores import Scores
from tinylab.evaluation.statistics import Z95, holm, unpaired_z


def own_moves(store: str | Path, alpha: float = 0.05) -> pandas.DataFrame:
    """One row per task and pair of neighbouring checkpoints of a store, joined item by item.

    Neighbours are the nearest two scored on the same items under one profile, task by task.
    Columns: `task, from, to` (labels), `tokens` (after), `change, low, high` (fractions), `right to wrong`,
    `wrong to right`, `p` (exact McNemar), `p_holm` (over the whole table), `significant` (p_holm < alpha).
    """
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
    return _with_holm(sorted(rows, key=lambda row: (row["task"], row["tokens"])), alpha)


def published_moves(table: pandas.DataFrame, alpha: float = 0.05) -> pandas.DataFrame:
    """Neighbouring milestones of TinyLlama v1.0 by an unpaired z on rebuilt counts: weaker than pairs of items.

    `table` is `published()`. Columns as in `own_moves`, without the counts of items that changed side.
    """
    known: Any = table[table["n"].notna() & table["label"].str.endswith("k")]
    rows = []
    for task, group in known.sort_values("tokens").groupby("task", sort=False):
        for a, b in pairwise(group.to_dict("records")):
            z = unpaired_z(int(a["k"]), int(a["n"]), int(b["k"]), int(b["n"]))
            change, half = b["k"] / b["n"] - a["k"] / a["n"], Z95 * (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5
            rows.append(
                {"task": task, "from": a["label"], "to": b["label"], "tokens": b["tokens"], "change": change}
                | {"low": change - half, "high": change + half, "p": 2 * NormalDist().cdf(-abs(z))}
            )
    return _with_holm(rows, alpha)


def mean_contributions(table: pandas.DataFrame, before: str, after: str) -> pandas.DataFrame:
    """What moved the mean over tasks between two labels: each task's change and its share of the mean's change.

    Columns: `task, before, after` (percent), `change` and `of the mean` (points); the last row is the mean itself.
    Uses the rows with a count (`k` of `n`), so the mean is that of the rebuilt scores.
    """
    known: Any = table[table["n"].notna()]
    percent = (100 * known["k"] / known["n"]).groupby([known["task"], known["label"]], sort=False).first().unstack()
    rows = percent[[before, after]].dropna().set_axis(["before", "after"], axis=1)
    rows = rows.assign(change=rows["after"] - rows["before"])
    rows["of the mean"] = rows["change"] / len(rows)
    rows = rows.sort_values("change", key=abs, ascending=False, kind="stable")
    mean = rows.mean()
    mean["of the mean"] = mean["change"]
    return pandas.concat([rows, mean.to_frame("mean").T]).rename_axis("task").reset_index()


def _with_holm(rows: list[dict[str, Any]], alpha: float) -> pandas.DataFrame:
    adjusted = holm([row["p"] for row in rows])
    return pandas.DataFrame([r | {"p_holm": p, "significant": p < alpha} for r, p in zip(rows, adjusted, strict=True)])
