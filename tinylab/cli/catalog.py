"""Verb `checkpoints`: own and published milestones, the audit of a series, and the cache of downloads."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from tinylab.cli.output import Answer, table
from tinylab.config.counts import format_bytes
from tinylab.errors import EXIT_FAILED, ConfigError, NothingFoundError
from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import Run, list_runs, step_of


def checkpoints_verb(
    refs: Annotated[tuple[str, ...], arg(metavar="RUN|REF")] = (),
    /,
    published: bool = False,
    audit: bool = False,
    figure: Path | None = None,
    fetch: bool = False,
    cached: bool = False,
    remove: bool = False,
) -> Answer:
    """The registry: own checkpoints (step, tokens, stage, size, optimizer state or not) and published milestones.

    Args:
        refs: list only these runs: folders, or names below runs/. The options below say what else they may be.
        published: list only the published milestones: TinyLlama's, and every one of Pythia's.
        audit: read every tensor of a run, or of two REFs and more: is this series what it claims to be? Exit code 1
            if it is not.
        figure: with --audit, a PNG of the distances between all checkpoints.
        fetch: download REFs of the registry or the Hub into the cache; an interrupted download resumes.
        cached: list the downloads and the disk they use.
        remove: delete REFs (owner/name, with @REVISION one of it, or a registry name) from the cache.
    """
    if figure is not None and not audit:
        raise ConfigError("--figure needs --audit: it draws what the audit measured")
    if sum((published, audit, fetch, cached, remove)) > 1:
        raise ConfigError("give one of --published, --audit, --fetch, --cached, --remove")
    if (audit or fetch or remove) and not refs:
        raise ConfigError(f"{'--audit' if audit else '--fetch and --remove'} needs REFs; found none")
    if audit:
        return _audit(refs, figure)
    if fetch:
        return _fetch(refs)
    if remove:
        return _remove(refs)
    if cached:
        return _cached()
    if published:
        rows = _published()
        return Answer(rows, _published_table(rows))
    return _own(refs) if refs else _registry()


def _own(refs: tuple[str, ...]) -> Answer:
    rows = [checkpoint_row(run, path) for run in (Run(r).require() for r in refs) for path in run.checkpoints()]
    if not rows:
        raise NothingFoundError(
            f"{', '.join(refs)} must hold committed checkpoints; found none. Train first: tinylab train RUN"
        )
    return Answer(rows, _own_table(rows))


def _registry() -> Answer:
    """Everything that a REF can name; in text, one line represents all of Pythia's steps."""
    own = [checkpoint_row(run, path) for run in list_runs() for path in run.checkpoints()]
    published = _published()
    shown = [r for r in published if r["series"] != "pythia-1b"]
    steps = [r["ref"] for r in published if r["series"] == "pythia-1b"]
    mine = _own_table(own) if own else "no own checkpoint yet: tinylab train mine"
    more = f"{steps[0]} … {steps[-1]}, {len(steps)} checkpoints: tinylab checkpoints --published"
    return Answer([*own, *published], f"{mine}\n\n{_published_table(shown)}\n{more}")


def _own_table(rows: list[dict[str, Any]]) -> str:
    shown = [{**r, "size": format_bytes(r["bytes"])} for r in rows]
    return table(shown, ["ref", "step", "tokens", "stage", "size", "optimizer"])


def checkpoint_row(run: Run, path: Path) -> dict[str, Any]:
    """What a checkpoint's own files say: ref, run, step, tokens, stage, bytes of the folder, optimizer state or not."""
    trainer = path / "trainer"
    try:
        record = json.loads((trainer / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    return {
        "ref": f"{run.name}@{step_of(path.name)}",
        "run": run.name,
        "step": step_of(path.name),
        "tokens": record.get("tokens"),
        "stage": record.get("stage"),
        "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        "optimizer": any(trainer.glob("*.safetensors")),
        "path": str(path),
    }


def _published() -> list[dict[str, Any]]:
    """The published milestones with the REF that names each, and the mean score that its authors printed."""
    from tinylab.catalog.milestones import PUBLISHED
    from tinylab.evaluation.published import MEAN, published

    scores: Any = published()
    rows = scores[scores["task"] == MEAN].to_dict("records")
    means = {(row["model"], row["label"], row["tokens"]): row["printed"] for row in rows}
    return [
        {"ref": m.label, **dataclasses.asdict(m), "mean_score": means.get((m.repository, m.title, m.tokens))}
        for m in PUBLISHED
    ]


def _published_table(rows: list[dict[str, Any]]) -> str:
    shown = [{**r, "as named": ", ".join(r["printed"]), "hub": f"{r['repository']}@{r['revision']}"} for r in rows]
    return table(shown, ["ref", "step", "tokens", "as named", "stage", "mean_score", "architecture", "hub"])


def _audit(refs: tuple[str, ...], figure: Path | None) -> Answer:
    from tinylab.analysis.series_audit import audit_series

    found = audit_series(refs, progress=lambda line: print(line, file=sys.stderr))
    if figure is not None:
        from tinylab.plots.model import series_audit

        write_atomic(figure.expanduser().absolute(), series_audit(found).png())
    document = {"ok": found.ok, "rows": found.table, "problems": [dataclasses.asdict(p) for p in found.problems]}
    document |= {"compared": found.compared, "distance": found.distance.tolist()}
    shown = [{**row, "hash": row["hash"] and row["hash"][:12]} for row in found.table]
    lines = [table(shown, ["label", "step", "tokens", "hash", "norm", "change", "bend", "nan"])]
    lines += [f"{p.kind}: {p.message}" for p in found.problems] or ["no problem found"]
    return Answer(document, "\n".join(lines), 0 if found.ok else EXIT_FAILED)


def _fetch(refs: tuple[str, ...]) -> Answer:
    from tinylab.catalog.reference import resolve_reference

    found = [resolve_reference(ref) for ref in refs]
    rows = [{"ref": r, "path": str(f.path), "notes": list(f.notes)} for r, f in zip(refs, found, strict=True)]
    notes = [f"note: {note}" for reference in found for note in reference.notes]
    return Answer(rows, "\n".join([table(rows, ["ref", "path"]), *notes]))


def _cached() -> Answer:
    from tinylab.catalog.hub import disk_use

    rows = disk_use()
    if not rows:
        raise NothingFoundError(
            "the cache must contain a model; found none. Download one: tinylab checkpoints REF --fetch"
        )
    shown = [{**r, "size": format_bytes(r["bytes"]), "commit": r["commit"][:12]} for r in rows]
    return Answer(rows, table(shown, ["repository", "revisions", "commit", "size", "files"]))


def _remove(refs: tuple[str, ...]) -> Answer:
    from tinylab.catalog.hub import remove
    from tinylab.catalog.milestones import PUBLISHED, find

    rows = []
    for ref in refs:
        milestone = find(ref)
        repository, _, revision = ref.partition("@")
        if milestone is not None:
            if milestone not in PUBLISHED:  # only the nearest: what was not named is not deleted
                raise NothingFoundError(f"{milestone.notes[0]}; name exactly what to remove")
            repository, revision = milestone.repository, milestone.revision
        rows.append({"ref": ref, "bytes": remove(repository, revision or None)})
    shown = [{"ref": r["ref"], "freed": format_bytes(r["bytes"])} for r in rows]
    return Answer(rows, table(shown))
