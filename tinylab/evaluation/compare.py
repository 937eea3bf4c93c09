"""Compare two models by name: score what is missing, then pair their stored items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinylab.catalog.reference import Reference, resolve_reference
from tinylab.errors import NothingFoundError
from tinylab.evaluation.evaluate import evaluate
from tinylab.evaluation.paired import Comparison, compare_records
from tinylab.evaluation.profile import Profile
from tinylab.evaluation.profile import profile as find_profile
from tinylab.evaluation.records import Record, ResultStore, default_store, open_store
from tinylab.evaluation.score_model import Scoring
from tinylab.evaluation.tasks import BENCHMARK_FILES, PROBES, expand

__all__ = ["Comparison", "compare", "compare_records"]


def compare(
    a: str | Path | Reference,
    b: str | Path | Reference,
    store: str | Path | ResultStore | None = None,
    tasks: str | Sequence[str] | None = None,
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    profile: str | Profile | None = None,
    limit: int | None = None,
    device: str = "cpu",
    evaluate_missing: bool = True,
    progress: bool = True,
) -> Comparison:
    """Compare two models on every task that both were scored on; what is missing is scored first.

    tasks, profile, limit: absent, whatever the store holds for both; what is scored now is then the probes, under
    `tinyllama-2023`, whole. With `evaluate_missing` off nothing is computed. Other arguments as in `evaluate`; a model
    that is no run takes the other's data for the probes.
    Raises EvaluationError listing the fields in which profiles or items differ, NothingFoundError without results.
    """
    first, second = resolve_reference(a), resolve_reference(b)
    stores = [open_store(store) if store is not None else ResultStore(default_store(r.run)) for r in (first, second)]
    held = [_held(r, s, profile) for r, s in zip((first, second), stores, strict=True)]
    theirs = {r.key.task for r in held[1]}
    common = [task for task in dict.fromkeys(r.key.task for r in held[0]) if task in theirs]
    if tasks is None and (limit is not None or not common):
        tasks = common or ("probes",)
    if tasks is not None and evaluate_missing:
        if data is None and (run := first.run or second.run) is not None and set(expand(tasks)) & set(PROBES):
            from tinylab.data.trace import stored_shards
            from tinylab.runs.folder import Run

            data = stored_shards(Run(run)).path
        held = [
            evaluate(
                r,
                tasks,
                s,
                data=data,
                data_dir=data_dir,
                profile=profile or "tinyllama-2023",
                limit=limit,
                device=device,
                progress=progress,
            )
            for r, s in zip((first, second), stores, strict=True)
        ]
    elif tasks is not None:
        names = expand(tasks)
        held = [
            [r for r in records if r.key.task in names and limit in (None, r.header.get("limit"))] for records in held
        ]
    for reference, records, place in zip((first, second), held, stores, strict=True):
        if not records:
            raise NothingFoundError(
                f"{place.path} holds no results of {reference.label}; score it: tinylab evaluate {reference.label}"
            )
    comparison = compare_records(*held)
    names = {"a": first, "b": second}
    identities = {
        side: {"label": r.label, "step": r.step, "tokens": r.tokens, "stage": r.stage}
        | {"weights": getattr(comparison, side)["weights"]}
        for side, r in names.items()
    }
    return Comparison(**identities, pairs=comparison.pairs, notes=comparison.notes + first.notes + second.notes)


def _held(reference: Reference, store: ResultStore, profile: str | Profile | None) -> list[Record]:
    """What a store holds for a model, found by its weights; tasks in the order in which they are scored."""
    wanted = None if profile is None else find_profile(profile).hash
    records = [r for r in store.records() if wanted in (None, r.key.profile)]
    if not records:
        return []
    weights = Scoring(reference, store, Profile(name="any")).weights
    places = {task: i for i, task in enumerate([*PROBES, *BENCHMARK_FILES])}
    held = (r for r in records if r.key.weights == weights)
    return sorted(held, key=lambda r: places.get(r.key.task, len(places)))
