"""Results item by item: one JSON Lines file per (weights, tokenizer, profile, task, version, items), written whole.

    STORE/results/<weights>-<tokenizer>-<profile>/<task>-v<version>-<items>.jsonl
    STORE/documents/<task>-<items>.jsonl            prompts, choices and origins, once for all models

The first line of a result is its record (what was scored, how, by what), each further line one item. Metrics are
computed on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylab.errors import ConfigError, EvaluationError, NothingFoundError
from tinylab.evaluation.statistics import standard_error, wilson_interval
from tinylab.runs.durable import disk_error, read_lines, write_atomic
from tinylab.runs.folder import Run, home, resolve_run

if TYPE_CHECKING:
    import pandas

METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Accuracies that `score_item` can give, by lm-eval's names."""


@dataclass(frozen=True)
class Key:
    """What makes two results the same measurement. Hashes are hexadecimal SHA-256."""

    weights: str
    tokenizer: str
    profile: str
    task: str
    version: str
    items: str
    """Hash over the documents' hashes in order: another split, limit or data file is another measurement."""

    @property
    def relative_path(self) -> str:
        """Where the record lies in its store."""
        folder = f"{self.weights[:16]}-{self.tokenizer[:12]}-{self.profile[:12]}"
        return f"results/{folder}/{self.task}-v{self.version}-{self.items[:12]}.jsonl"

    @property
    def documents_path(self) -> str:
        """Where the texts of its items lie in the store, once for all models."""
        return f"documents/{self.task}-{self.items[:12]}.jsonl"


def items_hash(doc_hashes: Iterable[str]) -> str:
    """One hash for an ordered set of documents."""
    return hashlib.sha256("\n".join(doc_hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """One stored measurement: its header (a dictionary of plain values), its items, and where they lie."""

    path: Path
    header: dict[str, Any]

    @property
    def key(self) -> Key:
        """The key under which it is stored."""
        return Key(**self.header["key"])

    def items(self) -> list[dict[str, Any]]:
        """The item rows, in document order."""
        return list(_read(self.path))[1:]

    def documents(self) -> dict[str, dict[str, Any]]:
        """`prompt`, `choices` and, for probes, `origin` of each item, by `doc_hash`; empty when they were removed."""
        path = self.path.parents[2] / self.key.documents_path
        return {d["doc_hash"]: d for d in read_lines(path)[0]}


class ResultStore:
    """A folder of measurements. Readers see whole records only; writers replace nothing that is there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def has(self, key: Key) -> bool:
        """Whether that measurement is finished."""
        return (self.path / key.relative_path).is_file()

    def get(self, key: Key) -> Record:
        """The stored measurement. Raises NothingFoundError when there is none."""
        path = self.path / key.relative_path
        if not path.is_file():
            raise NothingFoundError(f"{path} must hold the results of {key.task}; found nothing: evaluate it first")
        return Record(path, next(_read(path)))

    def put(self, key: Key, header: dict[str, Any], items: list[dict[str, Any]]) -> Record:
        """Write a measurement whole, by temporary name and rename."""
        path = self.path / key.relative_path
        header = {"version": 1, "key": vars(key), **header}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in [header, *items])
        write_atomic(path, "\n".join(lines) + "\n")
        return Record(path, header)

    def put_documents(self, key: Key, documents: list[dict[str, Any]]) -> None:
        """Keep the texts of a measurement's items, unless another model's measurement brought them already."""
        path = self.path / key.documents_path
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))

    def records(self) -> list[Record]:
        """Every finished measurement, by tokens seen, then label, then task."""
        found = [Record(path, next(_read(path))) for path in sorted(self.path.glob("results/*/*.jsonl"))]
        return sorted(found, key=lambda r: (r.header.get("tokens") or 0, r.header["label"], r.header["key"]["task"]))


_HEADER = {"key", "label", "metric", "metrics", "profile"}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a record. Raises EvaluationError naming file and line when one is not what this module writes."""
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                valid = isinstance(row, dict) and (number > 1 or (set(row) >= _HEADER and bool(Key(**row["key"]))))
            except (ValueError, TypeError):  # no JSON, no text; a key of other fields
                valid, row = False, {}
            if not valid:
                raise EvaluationError(
                    f"{path}, line {number} is not a line of a result store; found {line[:60]!r}. "
                    "Remove the file and evaluate again"
                )
            yield row
    if number < 2:
        raise EvaluationError(f"{path} must hold a record and its items; it holds none. Remove it and evaluate again")


def default_store(run: Path | None) -> Path:
    """`RUN/evaluations` for a run's checkpoints, `evaluations` in the home folder for any other model."""
    return Run(run).evaluations_path if run is not None else home() / "evaluations"


def open_store(store: str | Path | ResultStore) -> ResultStore:
    """A store given as itself, as its folder, as a run folder, or as a run's name."""
    if isinstance(store, ResultStore):
        return store
    path = Path(store).expanduser()
    run = Run(resolve_run(store))
    if run.exists() and (not path.is_dir() or run.path == path.absolute()):
        return ResultStore(run.evaluations_path)
    return ResultStore(path)


def predictions(item: dict[str, Any]) -> dict[str, int]:
    """The chosen answer by each accuracy that the item's numbers allow; the first of equal scores, as in lm-eval."""
    scores = {"acc": item["loglikelihoods"]}
    scores["acc_norm"] = _per(item["loglikelihoods"], item["characters"])
    scores["acc_bytes"] = _per(item["loglikelihoods"], item["bytes"])
    if item.get("unconditional") is not None:
        pairs = zip(item["loglikelihoods"], item["unconditional"], strict=True)
        scores["acc_mutual_info"] = [with_context - without for with_context, without in pairs]
    return {metric: max(range(len(s)), key=s.__getitem__) for metric, s in scores.items()}


def _per(values: list[float], lengths: list[int]) -> list[float]:
    return [v / n for v, n in zip(values, lengths, strict=True)]


def score_item(item: dict[str, Any], metric: str) -> bool:
    """Whether the item counts as right under `metric`. Raises EvaluationError when its numbers do not allow it."""
    chosen = predictions(item)
    if metric not in chosen:
        raise EvaluationError(f"metric must be one of {', '.join(chosen)} for this task; found {metric!r}")
    return chosen[metric] == item["gold"]


def margin(item: dict[str, Any], metric: str = "acc") -> float:
    """Score of the right answer minus that of the best other one, in the metric's unit (nats, or nats per length)."""
    scores = item["loglikelihoods"]
    if metric == "acc_mutual_info":
        scores = [a - b for a, b in zip(scores, item["unconditional"], strict=True)]
    elif metric in ("acc_norm", "acc_bytes"):
        scores = _per(scores, item["characters" if metric == "acc_norm" else "bytes"])
    gold = item["gold"]
    return scores[gold] - max(s for i, s in enumerate(scores) if i != gold)


def _yes_share(items: list[dict[str, Any]]) -> float:
    """Share of BoolQ answered "yes": at small sizes it measures the prior, not reading."""
    return sum(predictions(item)["acc"] == 1 for item in items) / len(items)


def row_of(record: Record, metric: str | None = None) -> dict[str, Any]:
    """One measurement as a row (see `Scores.rows`). Raises EvaluationError when its items do not allow `metric`."""
    header, items = record.header, record.items()
    name = metric or header["metric"]
    right = [score_item(item, name) for item in items]
    k, n = sum(right), len(items)
    low, high = wilson_interval(k, n)
    return (
        {f: header.get(f) for f in ("label", "step", "tokens", "stage")}
        | {"task": record.key.task, "metric": name, "value": k / n, "low": low, "high": high, "n": n, "k": k}
        | {"stderr": standard_error(k, n), "chance": header.get("chance"), "baseline": header.get("baseline")}
        | {"yes_share": _yes_share(items) if record.key.task == "boolq" else None}
        | {"ties": sum(margin(i, name) == 0 for i in items), "truncated": sum(i["truncated"] for i in items)}
        | {"weights": record.key.weights, "profile": header["profile"]["name"]}
    )


class Scores:
    """What a store says: `.table()` with intervals, `.items(…)` one row per item."""

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
        known = dict.fromkeys(m for r in self.records() for m in r.header["metrics"])
        if metric not in (None, *known):
            raise ConfigError(f"metric must be one of {', '.join(known)}; found {metric!r}")
        return [row_of(r, metric) for r in self.records() if metric is None or metric in r.header["metrics"]]

    def table(self, metric: str | None = None) -> pandas.DataFrame:
        """`rows` as a DataFrame, oldest checkpoint first."""
        import pandas

        return pandas.DataFrame(self.rows(metric))

    def items(self, ref: str, task: str) -> pandas.DataFrame:
        """The items of one task for the model given by label or by the beginning of its weight hash.

        Raises NothingFoundError naming what the store holds.
        """
        import pandas

        records = self.records()
        for record in records:
            if record.key.task == task and (ref == record.header["label"] or record.key.weights.startswith(ref)):
                return pandas.DataFrame(record.items())
        held = sorted({f"{r.header['label']}: {r.key.task}" for r in records})
        raise NothingFoundError(f"{self.store.path} holds no {task} of {ref}; it holds {', '.join(held)}")
