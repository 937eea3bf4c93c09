"""Is this series of checkpoints what it claims to be? Duplicates, swapped or foreign steps, drift, damage, NaN.

A broken series can go unnoticed: in EleutherAI/pythia#205, 86 of 154 branches held the weights of another step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinylab.analysis.fingerprint import Fingerprint, distance_matrix, fingerprint
from tinylab.analysis.series_order import Finding, bends, find_strays, violation
from tinylab.catalog.reference import Reference, resolve_reference, run_references
from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError, NothingFoundError
from tinylab.runs.folder import Run
from tinylab.runs.manifest import MANIFEST, verify_folder

Kind = (
    Literal["damaged", "duplicate", "shared", "swapped", "misplaced", "foreign", "config", "tokenizer", "dtype"]
    | (Literal["nan", "zero"])
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, with the labels of the checkpoints concerned."""

    kind: Kind
    labels: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class SeriesAudit:
    """What was found. `problems` is empty for a series that is what it claims to be."""

    labels: tuple[str, ...]
    """In the order of their steps."""
    table: list[dict[str, Any]]
    """One row per checkpoint: label, step, tokens, hash, norm, change (distance from the one before), bend, nan, …"""
    problems: list[Problem]
    compared: tuple[str, ...]
    """Labels of the rows and columns of `distance`: those that could be read and have the series' shape."""
    distance: np.ndarray = field(repr=False)
    """Relative distances (n, n) between the compared checkpoints (analysis/fingerprint.py)."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def audit_series(refs: Sequence[str | Path | Reference], progress: Callable[[str], None] | None = None) -> SeriesAudit:
    """Audit checkpoints in the order of their steps (as numbers), or in the given order if any of them has no step.

    refs: REFs, or a single run, which means all its checkpoints. Reads every weight once; memory: one tensor and 4 MB
    per checkpoint. progress: called with each label. Raises NothingFoundError when there is no checkpoint.
    """
    if len(refs) == 1 and not isinstance(refs[0], Reference) and Run(refs[0]).exists():
        references = run_references(Run(refs[0]))
    else:
        references = [resolve_reference(ref) for ref in refs]
    if not references:
        raise NothingFoundError("a series to audit must have checkpoints; found none. Name them, or a run")
    if all(r.step is not None for r in references):
        references.sort(key=lambda r: r.step or 0)
    prints: dict[int, Fingerprint] = {}
    problems: list[Problem] = []
    names = [r.label for r in references]
    labels = [n if names.count(n) == 1 else f"{n} ({names[: i + 1].count(n)})" for i, n in enumerate(names)]
    for i, reference in enumerate(references):
        if progress:
            progress(labels[i])
        try:
            if (reference.path / MANIFEST).is_file():
                damage = verify_folder(reference.path)
                problems += [Problem("damaged", (labels[i],), f"{labels[i]}: {line}") for line in damage]
            prints[i] = fingerprint(reference.path)
        except CheckpointError as error:
            problems.append(Problem("damaged", (labels[i],), f"{labels[i]} cannot be read: {error}"))
    problems += _each(prints, labels)
    twins, copies = _duplicates(prints, labels)
    shape = _majority([_shape(p.model) for p in prints.values()])
    usable = [i for i, p in prints.items() if _shape(p.model) == shape and not p.nan and not p.infinite]
    distance, cosine = distance_matrix([prints[i] for i in usable])
    on_path, more = _one_of_each(usable, copies, distance, labels)
    problems += twins + more
    at = [usable.index(i) for i in on_path]
    found, order = find_strays(distance[np.ix_(at, at)], cosine[np.ix_(at, at)])
    problems += _strays(found, order, [labels[i] for i in on_path])
    bend = dict(zip(usable, bends(distance), strict=True))
    change = {b: float(distance[j, j + 1]) for j, b in enumerate(usable[1:])}
    table = [_row(references[i], labels[i], prints.get(i), change.get(i), bend.get(i)) for i in range(len(references))]
    return SeriesAudit(tuple(labels), table, problems, tuple(labels[i] for i in usable), distance)


def _shape(model: Model) -> Model:
    """The configuration without the settings of initialization, which no longer matter after training."""
    return replace(model, init="normal", init_std=0.02)


def _majority(values: list[Any]) -> Any:
    return max(values, key=values.count) if values else None


def _each(prints: dict[int, Fingerprint], labels: list[str]) -> list[Problem]:
    """What is wrong with one checkpoint alone: unlike most of the series in its settings, NaN, all zero."""
    problems: list[Problem] = []
    shape = _majority([_shape(p.model) for p in prints.values()])
    dtype = _majority([p.dtype for p in prints.values()])
    tokenizer = _majority([p.tokenizer for p in prints.values()])
    for i, p in prints.items():
        mine, label = _shape(p.model), labels[i]
        keys = [f.name for f in fields(Model) if getattr(mine, f.name) != getattr(shape, f.name)]
        other = ", ".join(f"{k} {getattr(mine, k)} (the series: {getattr(shape, k)})" for k in keys)
        found: dict[Kind, str | None] = {
            "config": f"has another configuration: {other}" if keys else None,
            "dtype": f"is stored in {p.dtype} (the series: {dtype})" if p.dtype != dtype else None,
            "tokenizer": f"has {'another' if p.tokenizer else 'no'} tokenizer, unlike the rest of the series"
            if p.tokenizer != tokenizer
            else None,
            "nan": f"holds {p.nan} NaN and {p.infinite} infinite values" if p.nan or p.infinite else None,
            "zero": f"has tensors that are all zero: {', '.join(p.zero[:10])}" if p.zero else None,
        }
        problems += [Problem(kind, (label,), f"{label} {what}") for kind, what in found.items() if what]
    return problems


def _duplicates(prints: dict[int, Fingerprint], labels: list[str]) -> tuple[list[Problem], list[list[int]]]:
    """Problems for checkpoints that share matrices, and the groups whose every weight is equal."""
    groups: dict[str, list[int]] = {}
    for i, p in prints.items():
        groups.setdefault(p.hash, []).append(i)
    first = [members[0] for members in groups.values()]
    problems = []
    for n, a in enumerate(first):
        for b in first[n + 1 :]:
            mine, theirs = prints[a].hashes, prints[b].hashes
            matrices = [name for name in mine if not name.endswith("norm.weight")]
            same = [name for name in matrices if theirs.get(name) == mine[name]]
            if same:
                what = f"{labels[a]} and {labels[b]} share {len(same)} of {len(matrices)} matrices bit for bit"
                problems.append(Problem("shared", (labels[a], labels[b]), f"{what}: {', '.join(same[:5])}"))
    return problems, [members for members in groups.values() if len(members) > 1]


def _one_of_each(
    usable: list[int], copies: list[list[int]], distance: np.ndarray, labels: list[str]
) -> tuple[list[int], list[Problem]]:
    """The usable checkpoints with one of each group of copies: the one that best fits where it is."""
    problems, dropped = [], set[int]()
    for members in copies:
        names = tuple(labels[i] for i in members)
        others = [usable.index(i) for i in usable if not any(i in group for group in copies)]
        here = {i: violation(distance, sorted([*others, usable.index(i)])) for i in members if i in usable}
        best = min(here, key=lambda i: here[i], default=members[0])
        dropped |= set(members) - {best}
        wrong = ", ".join(labels[i] for i in members if i != best)
        is_certain = sum(v <= here[best] + 1e-9 for v in here.values()) == 1
        place = (
            f"{labels[best]} is in the right place, not {wrong}" if is_certain else "each could be in the right place"
        )
        what = f"{' and '.join(names)} have the same weights, bit for bit; {place}"
        problems.append(Problem("duplicate", names, what))
    return [i for i in usable if i not in dropped], problems


def _strays(found: list[Finding], order: list[int], labels: list[str]) -> list[Problem]:
    """Checkpoints that are out of place; two that are in each other's place make one problem."""
    expected = [i for i in range(len(labels)) if i in order]
    changed = {a: b for a, b in zip(expected, order, strict=True) if a != b}
    problems, paired = [], set[int]()
    for a, b in changed.items():
        if a < b and changed.get(b) == a:
            paired |= {a, b}
            what = f"{labels[a]} and {labels[b]} look swapped: each has the weights that belong in the other's place"
            problems.append(Problem("swapped", (labels[a], labels[b]), what))
    for f in found:
        label = labels[f.index]
        if not f.fits:
            bend = f" (bend {f.bend:.2f})" if f.bend else ""
            what = f"{label} fits nowhere between the others{bend}: it is from another run, or training jumped there"
            problems.append(Problem("foreign", (label,), what))
        elif f.index not in paired:
            where = [f"after {labels[f.after]}"] if f.after is not None else []
            where += [f"before {labels[f.before]}"] if f.before is not None else []
            what = f"{label} is out of place: its weights belong {' and '.join(where)}"
            problems.append(Problem("misplaced", (label,), what))
    return problems


def _row(
    reference: Reference, label: str, p: Fingerprint | None, change: float | None, bend: float | None
) -> dict[str, Any]:
    return (
        {"label": label, "step": reference.step, "tokens": reference.tokens}
        | {name: getattr(p, name, None) for name in ("hash", "dtype", "norm")}
        | {"change": change, "bend": bend}
        | {name: getattr(p, name, None) for name in ("nan", "infinite")}
        | {"path": str(reference.path)}
    )
