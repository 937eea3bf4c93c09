"""Compare two models by name: score what is missing, then pair their stored items (evaluation/paired.py)."""

from collections.abc import Sequence
from pathlib import Path

from tinylab.catalog.reference import Reference, resolve_reference
from tinylab.errors import NothingFoundError
from tinylab.evaluation.evaluate import evaluate, probe_data
from tinylab.evaluation.paired import IDENTITY, Comparison, compare_records
from tinylab.evaluation.probes import PROBES
from tinylab.evaluation.profile import Profile
from tinylab.evaluation.profile import profile as find_profile
from tinylab.evaluation.published import BENCHMARKS
from tinylab.evaluation.records import Record, ResultStore, default_store, open_store
from tinylab.evaluation.score_model import stored_weight_hash
from tinylab.evaluation.tasks import expand


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

    tasks, profile, limit: absent, whatever the store holds for both; if it holds nothing, all items of the probes are
    scored under `tinyllama-2023`. With `evaluate_missing` off nothing is computed. Other arguments as in `evaluate`; a
    model without a run takes the probes from the other's data.
    Raises EvaluationError listing the fields in which profiles or items differ, NothingFoundError without results.
    """
    models = resolve_reference(a), resolve_reference(b)
    stores = [open_store(store) if store is not None else ResultStore(default_store(m.run)) for m in models]
    held = [_held(m, s, profile) for m, s in zip(models, stores, strict=True)]
    if tasks is None:
        theirs = {r.key.task for r in held[1]}
        common = [task for task in dict.fromkeys(r.key.task for r in held[0]) if task in theirs]
        tasks = None if common and limit is None else common or ("probes",)
    names = [] if tasks is None else expand(tasks)
    if names and evaluate_missing:
        if data is None and set(names) & set(PROBES):
            data = probe_data(next((m for m in models if m.run is not None), models[0]))
        settings = {"data": data, "data_dir": data_dir, "profile": profile or "tinyllama-2023", "limit": limit}
        settings |= {"device": device, "progress": progress}
        held = [evaluate(m, names, s, **settings) for m, s in zip(models, stores, strict=True)]
    elif names:
        held = [[r for r in rs if r.key.task in names and limit in (None, r.header.get("limit"))] for rs in held]
    for model, records, place in zip(models, held, stores, strict=True):
        if not records:
            raise NothingFoundError(
                f"{place.path} must hold results of {model.label}; found none. Score it: tinylab evaluate {model.label}"
            )
    found = compare_records(*held)
    identities = [
        {f: getattr(model, f) for f in IDENTITY} | {"weights": side["weights"]}
        for model, side in zip(models, (found.a, found.b), strict=True)
    ]
    return Comparison(*identities, pairs=found.pairs, notes=found.notes + models[0].notes + models[1].notes)


def _held(model: Reference, store: ResultStore, profile: str | Profile | None) -> list[Record]:
    """What a store holds for a model, found by its weights; tasks in the order in which they are scored."""
    wanted = None if profile is None else find_profile(profile).hash
    records = [r for r in store.records() if wanted in (None, r.key.profile)]
    if not records:
        return []
    weights = stored_weight_hash(model.path, store)
    places = {task: i for i, task in enumerate([*PROBES, *BENCHMARKS])}
    held = (r for r in records if r.key.weights == weights)
    return sorted(held, key=lambda r: places.get(r.key.task, len(places)))
