"""Scores of models on tasks: lm-eval builds prompts and metrics, our model answers, every item is kept.

What the store holds already is not computed again, and says so; each finished task is kept before the next begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tinylab.catalog.reference import Reference, resolve_reference, run_references
from tinylab.errors import ConfigError, DataError, EvaluationError
from tinylab.evaluation.profile import Profile
from tinylab.evaluation.profile import profile as find_profile
from tinylab.evaluation.records import Record, ResultStore, default_store, open_store
from tinylab.evaluation.score_model import Scoring, say
from tinylab.evaluation.tasks import PROBES, EvaluationTask, benchmark, expand, probe
from tinylab.runs.folder import Run

Ref = str | Path | Reference


def evaluate(
    ref: Ref | Sequence[Ref],
    tasks: str | Sequence[str] = ("probes",),
    store: str | Path | ResultStore | None = None,
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    profile: str | Profile = "tinyllama-2023",
    limit: int | None = None,
    device: str = "cpu",
    all_checkpoints: bool = False,
    max_tokens: int = 8192,
    progress: bool = True,
) -> list[Record]:
    """The stored records of every model on every task, computed where the store lacks them.

    ref: a REF or several; with `all_checkpoints` each must be a run, and every checkpoint of it is scored.
    tasks: `probes` (`continuation` and `code`), `benchmarks`, or names of their tasks or of the probe `docstring`.
    store: default RUN/evaluations, else TINYLAB_HOME/evaluations.
    data: prepared data that the probes come from; default: that of the run. data_dir: `<task>.jsonl` files of the
    benchmarks; absent: the Hub. limit: the first so many items of each task. max_tokens: padded tokens of a batch.
    Raises ConfigError for a task, profile or limit that cannot be; EvaluationError, DataError, CheckpointError or
    NothingFoundError with what is missing.
    """
    names, settings = expand(tasks), find_profile(profile)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 item; found {limit}")
    records: list[Record] = []
    known: dict[tuple[str, Path | None], list[EvaluationTask]] = {}
    for reference in _references(ref, all_checkpoints):
        if all_checkpoints and not reference.path.exists():
            say(progress, f"note: left out: {reference.label} was removed meanwhile, by its run's retention")
            continue
        for note in reference.notes:
            say(progress, f"note: {note}")
        source = _data_of(reference, data) if set(names) & set(PROBES) else None
        wanted = known.setdefault((",".join(names), source), [])
        if not wanted:
            wanted += _tasks(names, source, data_dir, progress)
        target = open_store(store) if store is not None else ResultStore(default_store(reference.run))
        scoring = Scoring(
            reference, target, settings, limit=limit, device=device, max_tokens=max_tokens, progress=progress
        )
        records += [scoring.record(task) for task in wanted]
    return records


def _references(ref: Ref | Sequence[Ref], all_checkpoints: bool) -> list[Reference]:
    refs = [ref] if isinstance(ref, str | Path | Reference) else list(ref)
    if not all_checkpoints:
        return [resolve_reference(r) for r in refs]
    runs = [Run(str(r)) for r in refs]
    if parts := [str(r) for r, run in zip(refs, runs, strict=True) if "@" in str(r) and not run.exists()]:
        raise ConfigError(f"with all checkpoints each REF must be a run; found {', '.join(parts)}: leave out @…")
    return [resolve_reference(c.path) for run in runs for c in run_references(run)]


def _data_of(reference: Reference, data: str | Path | None) -> Path:
    """Folder of the prepared data that the probes are made from."""
    if data is not None:
        return Path(data).expanduser().absolute()
    if reference.run is None:
        raise EvaluationError(
            f"the probes are made from held-out documents; {reference.label} is no checkpoint of a run, so name the "
            "prepared data: --data DATA (data= in Python)"
        )
    from tinylab.data.trace import stored_shards

    return stored_shards(Run(reference.run)).path


def _tasks(
    names: Iterable[str], data: Path | None, data_dir: str | Path | None, progress: bool
) -> list[EvaluationTask]:
    """The tasks, built. A probe that the data cannot give is left out with a note, unless it is the only task."""
    built, problems = [], []
    for name in names:
        if name not in PROBES:
            built.append(benchmark(name, data_dir))
            continue
        from tinylab.data.shards.reader import open_shards
        from tinylab.evaluation.probes import N_ITEMS, build_probe

        assert data is not None
        try:
            shards = open_shards(data)
            items = build_probe(shards, name)
        except DataError as error:
            problems.append(error)
            continue
        if len(items) < N_ITEMS:
            say(progress, f"note: {name} has {len(items)} items, not {N_ITEMS}: the validation split gives no more")
        built.append(probe(name, items, f"data:{shards.fingerprint[:12]}"))
    if not built:
        raise problems[0]
    for problem in problems:
        say(progress, f"note: left out: {problem}")
    return built
