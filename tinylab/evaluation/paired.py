"""Two models on the same items, pair by pair: are they two at all, by how much do they differ, where, how surely?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas

from tinylab.errors import EvaluationError
from tinylab.evaluation.records import Record
from tinylab.evaluation.scores import margin, predictions, score_item
from tinylab.evaluation.statistics import MeanDifference, Paired, bootstrap_mean, holm, paired

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
        table = np.array([[score_item(item, self.metric) for item in pair] for pair in self.items])
        return table[:, 0], table[:, 1]

    @cached_property
    def result(self) -> Paired:
        """The 2 x 2 table, the difference and McNemar's p."""
        return paired(*self.right)

    @property
    def differences(self) -> np.ndarray:
        """B minus A per item: -1, 0 or 1."""
        return self.right[1].astype(float) - self.right[0]

    def margins(self) -> list[dict[str, Any]]:
        """`task, doc_hash, margin_a, margin_b` of every item: the right answer's score minus the best other one's."""
        pairs = ((a["doc_hash"], margin(a, self.metric), margin(b, self.metric)) for a, b in self.items)
        return [{"task": self.task, "doc_hash": h, "margin_a": a, "margin_b": b} for h, a, b in pairs]

    def flips(self) -> list[dict[str, Any]]:
        """The items that only one model has right (columns: `Comparison.flips`), in document order."""
        documents, rows = self.a.documents(), []
        for (a, b), row, right_a, right_b in zip(self.items, self.margins(), *self.right, strict=True):
            if right_a != right_b:
                text = documents.get(a["doc_hash"], {})
                rows.append(
                    {**row, "direction": "right → wrong" if right_a else "wrong → right", "gold": a["gold"]}
                    | {"chosen_a": predictions(a)[self.metric], "chosen_b": predictions(b)[self.metric]}
                    | {k: text[k] for k in ("prompt", "choices", "origin") if k in text}
                )
        return rows


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
        """Whether both names mean the same model: then every difference below is 0 by identity."""
        return self.a["weights"] == self.b["weights"]

    def rows(self) -> list[dict[str, Any]]:
        """One row per task: `task, metric, n, score_a, score_b, difference, low, high, stderr, p, p_holm, both_right,
        only_a, only_b, both_wrong`. Differences are B minus A as fractions, intervals 95%, p exact McNemar; `p_holm`
        is adjusted over all rows of this table.
        """
        rows = []
        for pair, p_holm in zip(self.pairs, holm([pair.result.p for pair in self.pairs]), strict=True):
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
        return pandas.DataFrame(self.rows())

    @cached_property
    def mean(self) -> MeanDifference:
        """Difference of the plain mean over tasks, with a paired bootstrap interval."""
        return bootstrap_mean({pair.task: pair.differences for pair in self.pairs})

    def moved(self) -> list[dict[str, Any]]:
        """What moved the mean: per task its `share` of the difference, and the difference `without` it with interval.

        Empty for a single task.
        """
        if len(self.pairs) < 2:
            return []
        rows = []
        for pair in self.pairs:
            rest = bootstrap_mean({p.task: p.differences for p in self.pairs if p is not pair})
            rows.append(
                {"task": pair.task, "share": pair.result.difference / len(self.pairs), "without": rest.difference}
                | {"low": rest.low, "high": rest.high}
            )
        return rows

    def flips(self, task: str | None = None) -> list[dict[str, Any]]:
        """Items that changed side, largest change of margin first: `task, doc_hash, margin_a, margin_b, direction,
        gold, chosen_a, chosen_b`, and `prompt, choices, origin` where the store has the texts.

        direction is `right → wrong` or `wrong → right`, A to B. Raises EvaluationError for a task that was not
        compared.
        """
        known = [pair.task for pair in self.pairs]
        if task is not None and task not in known:
            raise EvaluationError(f"task must be one of {', '.join(known)}; found {task!r}")
        rows = [row for pair in self.pairs if task in (None, pair.task) for row in pair.flips()]
        return sorted(rows, key=lambda row: -abs(row["margin_b"] - row["margin_a"]))

    def margins(self) -> pandas.DataFrame:
        """`task, doc_hash, margin_a, margin_b, change` of every item: the histogram under the scores."""
        frame = pandas.DataFrame([row for pair in self.pairs for row in pair.margins()])
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
        shown = ["task", "metric", "n", "score_a", "score_b", "difference", "low", "high", "p", "p_holm"]
        digits = dict.fromkeys(shown[3:8], "{:.4f}".format) | dict.fromkeys(shown[8:], "{:.2g}".format)
        table: Any = self.table()[[*shown, "only_a", "only_b"]]
        mean, count = self.mean, len(self.pairs)
        return "\n".join(
            [
                *(_identity(name, model) for name, model in (("A", self.a), ("B", self.b))),
                *(f"note: {note}" for note in self.notes),
                *(["A and B are the same weights."] if self.same_weights else []),
                "",
                table.to_string(index=False, formatters=digits),
                "",
                f"difference is B - A; p: exact McNemar; p_holm: Holm over a family of {count}",
                f"mean over {count} tasks: {mean.difference:+.4f} (95% {mean.low:+.4f} to {mean.high:+.4f}, "
                f"paired bootstrap of {mean.draws} draws)",
                *(
                    f"  without {r['task']}: {r['without']:+.4f} ({r['low']:+.4f} to {r['high']:+.4f})"
                    for r in self.moved()
                ),
            ]
        )


def compare_records(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compare two models by their stored records: every task of which both have the same items under one profile.

    Raises EvaluationError listing what differs when no task can be compared; `notes` names the tasks left out.
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
    """Why two records of one task must not be compared, field by field; empty when they may be."""
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


def _identity(name: str, model: dict[str, Any]) -> str:
    """A model in one line: label, step, tokens, stage, beginning of the weight hash."""
    tokens = None if model["tokens"] is None else f"{model['tokens']:,} tokens"
    parts = [None if model["step"] is None else f"step {model['step']}", tokens, model["stage"]]
    return f"{name}: {model['label']} ({', '.join([*filter(None, parts), 'weights ' + model['weights'][:12]])})"
