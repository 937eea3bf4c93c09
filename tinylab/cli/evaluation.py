"""Verbs `evaluate`, `scores` and `compare`."""

from typing import Annotated, Any

from tyro.conf import arg

from tinylab.cli.output import Answer, table
from tinylab.errors import ConfigError


def evaluate_verb(
    refs: Annotated[tuple[str, ...], arg(metavar="REF")],
    /,
    tasks: tuple[str, ...] = ("probes",),
    store: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    profile: str = "tinyllama-2023",
    limit: int | None = None,
    device: str = "cpu",
    all_checkpoints: bool = False,
) -> Answer:
    """Score models and keep every item; what the store already holds is not computed again.

    Args:
        refs: models: folders, RUN (its newest checkpoint), RUN@STEP, RUN@1.5M (tokens).
        tasks: probes (continuation and code: offline, from held-out documents), benchmarks, or names of tasks; the
            probe docstring, too hard for a model of a few million parameters, is scored only by name.
        store: folder of results; default: a run's own evaluations/, else evaluations/ in TINYLAB_HOME.
        data: data folder that the probes are made from; default: that of the run.
        data_dir: folder of <task>.jsonl files for the benchmarks; default: the Hub.
        profile: the settings under which scores may be compared: tinyllama-2023 or current.
        limit: at most this many items of each task.
        device: cpu or cuda.
        all_checkpoints: every checkpoint of each RUN instead of the newest.
    """
    if not refs:
        raise ConfigError("evaluate needs at least one REF; found none. List runs: tinylab runs")
    from tinylab.evaluation.evaluate import evaluate
    from tinylab.evaluation.scores import row_of

    settings = {"data": data, "data_dir": data_dir, "profile": profile, "limit": limit, "device": device}
    return _answer([row_of(r) for r in evaluate(refs, tasks, store, all_checkpoints=all_checkpoints, **settings)])


def _answer(rows: list[dict[str, Any]]) -> Answer:
    """All columns as JSON; as text those that fit a terminal."""
    shown = ["label", "tokens", "task", "metric", "value", "low", "high", "n", "chance", "baseline"]
    return Answer(rows, table(rows, shown))


def scores_verb(store: Annotated[str, arg(metavar="STORE")], /, metric: str | None = None) -> Answer:
    """Scores of a store with 95% intervals, chance, and the baseline: what a rule scores that needs no model.

    Args:
        store: folder of results, or a run (its own evaluations/).
        metric: acc, acc_norm, acc_bytes or acc_mutual_info; default: that of each task.
    """
    from tinylab.evaluation.scores import Scores

    return _answer(Scores(store).rows(metric))


def compare_verb(
    a: Annotated[str, arg(metavar="A")],
    b: Annotated[str, arg(metavar="B")],
    /,
    tasks: tuple[str, ...] | None = None,
    store: str | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    profile: str | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> Answer:
    """Two models on the same items, pair by pair: difference with interval, McNemar's test, Holm's correction.

    Args:
        a: the first model, as in evaluate.
        b: the second one; differences are B minus A.
        tasks: default: all that the store holds for both, or the probes where it holds none. What is missing is scored.
        store: folder of results that holds both; default: as in evaluate.
        data: data folder that the probes are made from; default: that of the run.
        data_dir: folder of <task>.jsonl files for the benchmarks.
        profile: default: that of the stored results; tinyllama-2023 for what is scored now.
        limit: at most this many items of each task.
        device: cpu or cuda.
    """
    from tinylab.evaluation.compare import compare

    found = compare(a, b, store, tasks, data=data, data_dir=data_dir, profile=profile, limit=limit, device=device)
    return Answer(found.document(), found.text())
