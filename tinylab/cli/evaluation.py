"""Verbs `evaluate`, `scores` and `compare`."""

from __future__ import annotations

from typing import Annotated, Any

from tyro.conf import arg

from tinylab.cli.output import Answer, table
from tinylab.errors import NothingFoundError


def evaluate_verb(
    refs: Annotated[tuple[str, ...], arg(metavar="REF")],
    /,
    tasks: tuple[str, ...] = ("probes",),
    store: str | None = None,
    data: str | None = None,
    profile: str = "tinyllama-2023",
    limit: int | None = None,
    device: str = "cpu",
    all_checkpoints: bool = False,
) -> Answer:
    """Score models and keep every item; what the store holds already is not computed again.

    Args:
        refs: models: folders, RUN (its newest checkpoint), RUN@STEP, RUN@1.5M (tokens).
        tasks: names of lm-eval tasks, or probes: offline tasks from held-out documents.
        store: folder of results; default: a run's own evaluations/, else evaluations/ in TINYLAB_HOME.
        data: data folder that the probes are made from; default: that of the run.
        profile: prompts, shots and metrics.
        limit: at most this many items of each task.
        device: cpu or cuda.
        all_checkpoints: every checkpoint of each RUN instead of the newest.
    """
    if not refs:
        raise NothingFoundError("evaluate needs at least one REF; found none. List runs: tinylab runs")
    from tinylab.evaluate.harness import evaluate

    records = []
    for ref in _every_checkpoint(refs) if all_checkpoints else refs:
        records += evaluate(ref, tasks=tasks, store=store, data=data, profile=profile, limit=limit, device=device)
    rows = [_score_row(record) for record in records]
    return Answer(rows, table(rows))


def _every_checkpoint(refs: tuple[str, ...]) -> list[str]:
    """RUN as one REF for each of its checkpoints."""
    from tinylab.runs.folder import Run

    return [str(path) for ref in refs for path in Run(ref).require().checkpoints()]


def _score_row(record: Any) -> dict[str, Any]:
    """One stored record as a row: model, task, items, accuracy with its 95% interval, chance."""
    from tinylab.evaluate.store import row_of

    return row_of(record)


def scores_verb(store: Annotated[str, arg(metavar="STORE")], /, metric: str | None = None) -> Answer:
    """Scores of a store with 95% intervals, and the chance level.

    Args:
        store: folder of results, or a run (its own evaluations/).
        metric: acc, acc_norm, acc_bytes or acc_mutual_info; default: that of each task.
    """
    from tinylab.evaluate.store import Scores

    rows = Scores(store).rows(metric)
    if not rows:
        raise NothingFoundError(f"{store} must hold results; found none. Fill it: tinylab evaluate REF")
    return Answer(rows, table(rows))


def compare_verb(
    a: Annotated[str, arg(metavar="A")],
    b: Annotated[str, arg(metavar="B")],
    /,
    store: str | None = None,
) -> Answer:
    """Two models on the same items, pair by pair: difference with interval, McNemar's test, Holm's correction.

    Args:
        a: the one model, as in evaluate.
        b: the other one.
        store: folder of results that holds both; default: as in evaluate.
    """
    from tinylab.evaluate.compare import compare

    comparison = compare(a, b, store=store)
    return Answer(comparison.document(), comparison.text())
