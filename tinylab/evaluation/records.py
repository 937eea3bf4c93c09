"""Results item by item: a complete JSON Lines file per (weights, tokenizer, profile, task, version, items).

    STORE/results/<weights>-<tokenizer>-<profile>/<task>-v<version>-<items>.jsonl
    STORE/documents/<task>-<items>.jsonl            prompts, choices and origins, once for all models

The first line of a result is its header (what was scored, how, by what), each further line one item. Metrics are
computed on reading (evaluation/scores.py).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.errors import EvaluationError
from tinylab.runs.durable import disk_error, read_lines, write_atomic
from tinylab.runs.folder import Run, home, resolve_run

_HEADER = {"key", "label", "metric", "metrics", "profile"}


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
        """File of the record in its store."""
        folder = f"{self.weights[:16]}-{self.tokenizer[:12]}-{self.profile[:12]}"
        return f"results/{folder}/{self.task}-v{self.version}-{self.items[:12]}.jsonl"

    @property
    def documents_path(self) -> str:
        """File of its items' texts in the store, one for all models."""
        return f"documents/{self.task}-{self.items[:12]}.jsonl"


def items_hash(doc_hashes: Iterable[str]) -> str:
    """One hash for an ordered set of documents."""
    return hashlib.sha256("\n".join(doc_hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """One stored measurement: its file and its header, a dictionary of plain values."""

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
    """A folder of measurements. Readers see complete records only; a record is never overwritten."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def get(self, key: Key) -> Record | None:
        """The stored measurement, or None if it was not made yet."""
        path = self.path / key.relative_path
        return Record(path, next(_read(path))) if path.is_file() else None

    def put(self, key: Key, header: dict[str, Any], items: list[dict[str, Any]]) -> Record:
        """Keep a measurement."""
        header = {"version": 1, "key": vars(key), **header}
        return Record(self.write(key.relative_path, [header, *items]), header)

    def put_documents(self, key: Key, documents: list[dict[str, Any]]) -> None:
        """Keep the texts of a measurement's items, unless another model's measurement brought them already."""
        if not (self.path / key.documents_path).is_file():
            self.write(key.documents_path, documents)

    def records(self) -> list[Record]:
        """Every finished measurement, by tokens seen, then label, then task."""
        found = [Record(path, next(_read(path))) for path in sorted(self.path.glob("results/*/*.jsonl"))]
        return sorted(found, key=lambda r: (r.header.get("tokens") or 0, r.header["label"], r.header["key"]["task"]))

    def write(self, relative_path: str, rows: list[dict[str, Any]]) -> Path:
        """Write a JSON Lines file of the store, by temporary name and rename."""
        path = self.path / relative_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(path, error) from error
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        return path


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a record. Raises EvaluationError naming file and line when one is not what this module writes."""
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                valid = isinstance(row, dict) and (number > 1 or (set(row) >= _HEADER and bool(Key(**row["key"]))))
            except (ValueError, TypeError):  # neither JSON nor text, or a key with other fields
                valid, row = False, {}
            if not valid:
                raise EvaluationError(
                    f"{path}, line {number} is not a line of a result store; found {line[:60]!r}. "
                    "Remove the file and evaluate again"
                )
            yield row
    if number < 2:
        raise EvaluationError(f"{path} must hold a record and its items; found none. Remove it and evaluate again")


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
