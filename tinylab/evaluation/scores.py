"""Scores from stored items: which answer was chosen under each metric, by what margin, and the table of a store."""

import os
from pathlib import Path
from typing import Any

import pandas

from tinylab.errors import ConfigError, EvaluationError, NothingFoundError
from tinylab.evaluation.records import Record, ResultStore, open_store
from tinylab.evaluation.statistics import standard_error, wilson_interval


def choice_scores(item: dict[str, Any]) -> dict[str, list[float]]:
    """Score of each choice under every metric that the item's numbers allow, by lm-eval's names.

    `acc`: log-likelihood in nats; `acc_norm`, `acc_bytes`: that per character, per byte; `acc_mutual_info`: less the
    log-likelihood without the context.
    """
    likelihoods = item["loglikelihoods"]
    scores = {"acc": likelihoods}
    for metric, lengths in (("acc_norm", item["characters"]), ("acc_bytes", item["bytes"])):
        scores[metric] = [v / n for v, n in zip(likelihoods, lengths, strict=True)]
    if item.get("unconditional") is not None:
        scores["acc_mutual_info"] = [v - u for v, u in zip(likelihoods, item["unconditional"], strict=True)]
    return scores


def predictions(item: dict[str, Any]) -> dict[str, int]:
    """The chosen answer under each metric; the first of equal scores, as in lm-eval."""
    return {metric: max(range(len(s)), key=s.__getitem__) for metric, s in choice_scores(item).items()}


def score_item(item: dict[str, Any], metric: str) -> bool:
    """Whether the item counts as right under `metric`. Raises EvaluationError when its numbers do not allow it."""
    chosen = predictions(item)
    if metric not in chosen:
        raise EvaluationError(f"metric must be one of {', '.join(chosen)} for this task; found {metric!r}")
    return chosen[metric] == item["gold"]


def margin(item: dict[str, Any], metric: str = "acc") -> float:
    """Score of the right answer minus that of the best other one, in the metric's unit (nats, or nats per length)."""
    scores, gold = choice_scores(item)[metric], item["gold"]
    return scores[gold] - max(s for i, s in enumerate(scores) if i != gold)


def row_of(record: Record, metric: str | None = None) -> dict[str, Any]:
    """One measurement as a row (see `Scores.rows`). Raises EvaluationError when its items do not allow `metric`."""
    header, items = record.header, record.items()
    name = metric or header["metric"]
    k, n = sum(score_item(item, name) for item in items), len(items)
    low, high = wilson_interval(k, n)
    yes = sum(predictions(i)["acc"] == 1 for i in items) / n  # of BoolQ: at small sizes the prior, not reading
    return (
        {f: header.get(f) for f in ("label", "step", "tokens", "stage")}
        | {"task": record.key.task, "metric": name, "value": k / n, "low": low, "high": high, "n": n, "k": k}
        | {"stderr": standard_error(k, n), "chance": header.get("chance"), "baseline": header.get("baseline")}
        | {"yes_share": yes if record.key.task == "boolq" else None}
        | {"ties": sum(margin(i, name) == 0 for i in items), "truncated": sum(i["truncated"] for i in items)}
        | {"weights": record.key.weights, "profile": header["profile"]["name"]}
    )


class Scores:
    """What a store holds: `.table()` with intervals, `.items(…)` one row per item."""

    def __init__(self, store: str | Path | ResultStore) -> None:
        self.store = open_store(store)

    def records(self) -> list[Record]:
        """Every finished measurement. Raises NothingFoundError when the store is empty."""
        found = self.store.records()
        if not found:
            raise NothingFoundError(
                f"{self.store.path} must hold results; found none. "
                f"Fill it: tinylab evaluate REF --store {os.path.relpath(self.store.path)}"
            )
        return found

    def rows(self, metric: str | None = None) -> list[dict[str, Any]]:
        """One dictionary per measurement: `label, step, tokens, stage, task, metric, value, low, high, n, k, stderr,
        chance, baseline, yes_share, ties, truncated, weights, profile`. Shares are fractions, intervals Wilson at 95%.

        `metric` None: each task's headline metric. Raises ConfigError for a metric that no task of the store has.
        """
        records = self.records()
        known = dict.fromkeys(m for r in records for m in r.header["metrics"])
        if metric not in (None, *known):
            raise ConfigError(f"metric must be one of {', '.join(known)}; found {metric!r}")
        return [row_of(r, metric) for r in records if metric is None or metric in r.header["metrics"]]

    def table(self, metric: str | None = None) -> pandas.DataFrame:
        """`rows` as a DataFrame, oldest checkpoint first."""
        return pandas.DataFrame(self.rows(metric))

    def items(self, ref: str, task: str) -> pandas.DataFrame:
        """The items of one task for the model given by label or by the beginning of its weight hash.

        Raises NothingFoundError naming what the store holds.
        """
        held = [(r.header["label"], r.key.task, r) for r in self.records()]
        for label, name, record in held:
            if name == task and (ref == label or record.key.weights.startswith(ref)):
                return pandas.DataFrame(record.items())
        known = ", ".join(sorted({f"{label}: {name}" for label, name, _ in held}))
        raise NothingFoundError(f"{self.store.path} has no {task} of {ref}; it holds {known}")
