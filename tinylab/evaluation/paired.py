"""Two models on the same items, pair by pair: are they two at all, by how much do they differ, where, how surely?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylab.errors import EvaluationError
from tinylab.evaluation.records import Record, margin, predictions, score_item
from tinylab.evaluation.statistics import MeanDifference, Paired, bootstrap_mean, holm, paired

if TYPE_CHECKING:
    import pandas

IDENTITY = ("label", "step", "tokens", "stage")


@dataclass(frozen=True)
class TaskPair:
    """One task scored for both models on the same items under the same profile."""

    task: str
    metric: str
    a: Record
    b: Record

    @cached_property
    def items(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(item of A, item of B), in document order."""
        first, second = self.a.items(), self.b.items()
        if [i["doc_hash"] for i in first] != [i["doc_hash"] for i in second]:
            raise EvaluationError(f"{self.a.path} and {self.b.path} must hold the same items in one order; they differ")
        return list(zip(first, second, strict=True))

    @cached_property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether A and B are right, item by item: two boolean arrays."""
        answers = [(score_item(a, self.metric), score_item(b, self.metric)) for a, b in self.items]
        table = np.array(answers, dtype=bool)
        return table[:, 0], table[:, 1]

    @cached_property
    def result(self) -> Paired:
        """The 2 x 2 table, the difference and McNemar's p."""
        return paired(*self.right)


@dataclass(frozen=True)
class Comparison:
    """B against A: `.table()`, `.mean`, `.moved()` and `.flips()` are views; `.document()` holds them all as JSON."""

    a: dict[str, Any]
    """Identity of A: label, step, tokens, stage, weights (hash)."""
    b: dict[str, Any]
    pairs: tuple[TaskPair, ...]
    notes: tuple[str, ...] = ()

    @property
    def same_weights(self) -> bool:
        """Whether both names stand for one and the same model: then every difference below is 0 by identity."""
        return self.a["weights"] == self.b["weights"]

    def rows(self) -> list[dict[str, Any]]:
        """One row per task: `task, metric, n, score_a, score_b, difference, low, high, stderr, p, p_holm, both_right,
        only_a, only_b, both_wrong`. Differences are B minus A as fractions, intervals 95%, p exact McNemar; `p_holm`
        is adjusted over all rows of this table.
        """
        adjusted = holm([pair.result.p for pair in self.pairs])
        rows = []
        for pair, p_holm in zip(self.pairs, adjusted, strict=True):
            result = pair.result
            low, high = result.interval()
            rows.append(
                {"task": pair.task, "metric": pair.metric, "n": result.n}
                | {"score_a": float(pair.right[0].mean()), "score_b": float(pair.right[1].mean())}
                | {"difference": result.difference, "low": low, "high": high, "stderr": result.stderr}
                | {"p": result.p, "p_holm": p_holm, "both_right": result.both}
                | {"only_a": result.only_a, "only_b": result.only_b, "both_wrong": result.neither}
            )
        return rows

    def table(self) -> pandas.DataFrame:
        """`rows` as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows())

    @cached_property
    def mean(self) -> MeanDifference:
        """Difference of the plain mean over tasks, with a paired bootstrap interval."""
        return bootstrap_mean({pair.task: _difference(pair) for pair in self.pairs})

    def moved(self) -> list[dict[str, Any]]:
        """What moved the mean: per task its `share` of the difference, and the difference `without` it with interval.

        Empty for a single task.
        """
        if len(self.pairs) < 2:
            return []
        rows = []
        for pair in self.pairs:
            rest = bootstrap_mean({p.task: _difference(p) for p in self.pairs if p is not pair})
            rows.append(
                {"task": pair.task, "share": pair.result.difference / len(self.pairs), "without": rest.difference}
                | {"low": rest.low, "high": rest.high}
            )
        return rows

    def flips(self, task: str | None = None) -> list[dict[str, Any]]:
        """Items that changed side, largest change of margin first: `task, direction, doc_hash, margin_a, margin_b,
        gold, chosen_a, chosen_b`, and `prompt, choices, origin` where the store has the texts.

        direction is `right → wrong` or `wrong → right`, A to B. Margins are the right answer's score minus the best
        other one's. Raises EvaluationError for a task that was not compared.
        """
        known = [pair.task for pair in self.pairs]
        if task is not None and task not in known:
            raise EvaluationError(f"task must be one of {', '.join(known)}; found {task!r}")
        return sorted(
            (row for pair in self.pairs if task in (None, pair.task) for row in _flips(pair)),
            key=lambda row: -abs(row["margin_b"] - row["margin_a"]),
        )

    def margins(self) -> pandas.DataFrame:
        """`task, doc_hash, margin_a, margin_b, change` of every item: the histogram under the scores."""
        import pandas

        rows = [
            {"task": pair.task, "doc_hash": a["doc_hash"]}
            | {"margin_a": margin(a, pair.metric), "margin_b": margin(b, pair.metric)}
            for pair in self.pairs
            for a, b in pair.items
        ]
        frame = pandas.DataFrame(rows)
        return frame.assign(change=frame["margin_b"] - frame["margin_a"])

    def document(self) -> dict[str, Any]:
        """Every view as plain values, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "same_weights": self.same_weights,
            "profile": self.pairs[0].a.header["profile"],
            "family_size": len(self.pairs),
            "tasks": self.rows(),
            "mean": asdict(self.mean),
            "moved": self.moved(),
            "flips": self.flips(),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The comparison for a terminal."""
        lines = [_identity("A", self.a), _identity("B", self.b), *(f"note: {n}" for n in self.notes)]
        if self.same_weights:
            lines.append("A and B are the same weights.")
        shown = ["task", "metric", "n", "score_a", "score_b", "difference", "low", "high", "p", "p_holm"]
        shown += ["only_a", "only_b"]
        digits = dict.fromkeys(shown[3:8], ".4f") | dict.fromkeys(("p", "p_holm"), ".2g")
        table = self.table()[shown]
        table = table.assign(**{name: [format(v, digits[name]) for v in table[name]] for name in digits})
        lines += ["", table.to_string(index=False)]
        mean = self.mean
        lines += [
            "",
            f"difference is B - A; p: exact McNemar; p_holm: Holm over a family of {len(self.pairs)}",
            f"mean over {len(self.pairs)} tasks: {mean.difference:+.4f} "
            f"(95% {mean.low:+.4f} to {mean.high:+.4f}, paired bootstrap of {mean.draws} draws)",
        ]
        lines += [
            f"  without {row['task']}: {row['without']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
            for row in self.moved()
        ]
        return "\n".join(lines)


def compare_records(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare two models by their stored records: every task of which both have the same items under one profile.

    Raises EvaluationError listing what differs when no task can be compared; tasks left out stand in `notes`.
    """
    pairs, refused = [], []
    for task in dict.fromkeys(r.key.task for r in first):
        candidates = [(a, b) for a in first for b in second if a.key.task == b.key.task == task]
        fitting = [(a, b) for a, b in candidates if not differences(a, b)]
        if fitting:  # the largest set of items that both have
            a, b = max(fitting, key=lambda pair: len(pair[0].items()))
            pairs.append(TaskPair(task, a.header["metric"], a, b))
        elif candidates:
            refused.append(f"{task}: " + "; ".join(differences(*candidates[-1])))
    if not pairs:
        reason = ". ".join(refused) or "they have no task in common"
        raise EvaluationError(f"two models must be scored on the same items under one profile; {reason}")
    identities = [{f: r.header.get(f) for f in IDENTITY} | {"weights": r.key.weights} for r in (pairs[0].a, pairs[0].b)]
    return Comparison(*identities, pairs=tuple(pairs), notes=tuple(f"left out: {text}" for text in refused))


def differences(a: Record, b: Record) -> list[str]:
    """Why two records of a task must not be compared, field by field; empty when they may."""
    ours, theirs = ({k: v for k, v in r.header["profile"].items() if k != "name"} for r in (a, b))
    found = [
        f"profile.{k} is {ours.get(k)!r} and {theirs.get(k)!r}" for k in ours | theirs if ours.get(k) != theirs.get(k)
    ]
    if a.key.version != b.key.version:
        found.append(f"task version is {a.key.version} and {b.key.version}")
    if a.key.items != b.key.items:
        hashes = [{i["doc_hash"] for i in r.items()} for r in (a, b)]
        common = len(hashes[0] & hashes[1])
        found.append(
            f"items are {len(hashes[0])} of {a.header['source']} and {len(hashes[1])} of {b.header['source']}, "
            f"{common} in common"
        )
    return found


def _difference(pair: TaskPair) -> np.ndarray:
    """B minus A per item: -1, 0 or 1."""
    right_a, right_b = pair.right
    return right_b.astype(np.float64) - right_a


def _flips(pair: TaskPair) -> list[dict[str, Any]]:
    documents = pair.a.documents()
    rows = []
    for (a, b), right_a, right_b in zip(pair.items, *pair.right, strict=True):
        if right_a != right_b:
            text = {k: v for k, v in documents.get(a["doc_hash"], {}).items() if k in ("prompt", "choices", "origin")}
            rows.append(
                {"task": pair.task, "direction": "right → wrong" if right_a else "wrong → right"}
                | {"doc_hash": a["doc_hash"], "margin_a": margin(a, pair.metric), "margin_b": margin(b, pair.metric)}
                | {"gold": a["gold"], "chosen_a": predictions(a)[pair.metric], "chosen_b": predictions(b)[pair.metric]}
                | text
            )
    return rows


def _identity(name: str, model: dict[str, Any]) -> str:
    """A model in one line: label, step, tokens, stage, beginning of the weight hash."""
    tokens = None if model["tokens"] is None else f"{model['tokens']:,} tokens"
    parts = [None if model["step"] is None else f"step {model['step']}", tokens, model["stage"]]
    return f"{name}: {model['label']} ({', '.join([*filter(None, parts), 'weights ' + model['weights'][:12]])})"
