"""Scores of models on tasks, the entry: lm-eval builds prompts and metrics, our model answers, every item is kept.

What the store already holds is not computed again. Each task is stored before the next begins.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tinylab.catalog.reference import Reference, resolve_reference, run_references
from tinylab.errors import ConfigError, DataError, EvaluationError
from tinylab.evaluation.probes import N_ITEMS, PROBES, build_probe
from tinylab.evaluation.profile import Profile
from tinylab.evaluation.profile import profile as find_profile
from tinylab.evaluation.records import Record, ResultStore, default_store, open_store
from tinylab.evaluation.score_model import ModelScorer, say
from tinylab.evaluation.tasks import EvaluationTask, benchmark, expand, probe
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
    benchmarks; default: the Hub. limit: at most this many items of each task. max_tokens: padded tokens of a batch.
    Raises ConfigError for an impossible task, profile or limit; EvaluationError, DataError, CheckpointError or
    NothingFoundError with what is missing.
    """
    names, settings = expand(tasks), find_profile(profile)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 item; found {limit}")
    records: list[Record] = []
    built: dict[Path | None, list[EvaluationTask]] = {}
    for reference in _references(ref, all_checkpoints):
        if all_checkpoints and not reference.path.exists():
            say(progress, f"note: left out: {reference.label} was removed meanwhile by its run's retention")
            continue
        for note in reference.notes:
            say(progress, f"note: {note}")
        source = None
        if set(names) & set(PROBES):
            source = probe_data(reference) if data is None else Path(data).expanduser().absolute()
        if source not in built:
            built[source] = _tasks(names, source, data_dir, progress)
        target = open_store(store) if store is not None else ResultStore(default_store(reference.run))
        scorer = ModelScorer(
            reference, target, settings, limit=limit, device=device, max_tokens=max_tokens, progress=progress
        )
        records += [scorer.record(task) for task in built[source]]
    return records


def probe_data(reference: Reference) -> Path:
    """Folder of the prepared data that a model was trained on. Raises EvaluationError for one that no run made."""
    if reference.run is None:
        raise EvaluationError(
            f"the probes are made from held-out documents of a run's data; {reference.label} is not a checkpoint of a "
            "run. Name the prepared data: --data DATA (data= in Python)"
        )
    from tinylab.data.trace import stored_shards

    return stored_shards(Run(reference.run)).path


def _references(ref: Ref | Sequence[Ref], all_checkpoints: bool) -> list[Reference]:
    refs = [ref] if isinstance(ref, str | Path | Reference) else list(ref)
    if not all_checkpoints:
        return [resolve_reference(r) for r in refs]
    runs = [Run(str(r)) for r in refs]
    if parts := [str(r) for r, run in zip(refs, runs, strict=True) if "@" in str(r) and not run.exists()]:
        raise ConfigError(f"with all checkpoints each REF must be a run; found {', '.join(parts)}: leave out @…")
    return [resolve_reference(c.path) for run in runs for c in run_references(run)]


def _tasks(
    names: Iterable[str], data: Path | None, data_dir: str | Path | None, progress: bool
) -> list[EvaluationTask]:
    """The tasks, built. A probe that the data cannot give is left out with a note, unless no task remains."""
    from tinylab.data.shards.reader import open_shards

    built, problems = [], []
    for name in names:
        if name not in PROBES:
            built.append(benchmark(name, data_dir))
            continue
        assert data is not None
        try:
            shards = open_shards(data)
            items = build_probe(shards, name)
        except DataError as error:
            problems.append(error)
            continue
        if len(items) < N_ITEMS:
            say(progress, f"note: {name} has {len(items)} items, not {N_ITEMS}: the validation split yields no more")
        built.append(probe(name, items, f"data:{shards.fingerprint[:12]}"))
    if not built:
        raise problems[0]
    for problem in problems:
        say(progress, f"note: left out: {problem}")
    return built
