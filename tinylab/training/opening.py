"""Before the first step: a run folder made or resumed, its records repaired, and everything checked that must fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinylab.checkpoint.retention import is_permanent, prune
from tinylab.checkpoint.store import latest_good, read_record
from tinylab.config.digest import config_digest
from tinylab.config.faults import Faults
from tinylab.config.io import run_to_dict, run_to_toml
from tinylab.config.schema import Parallel, RunConfig
from tinylab.data.loader import validation_windows
from tinylab.data.order import check_ranks
from tinylab.data.prepare import data_path, prepare
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.dist.context import Context
from tinylab.dist.parallel import layout_of
from tinylab.errors import CheckpointError, ConfigError, DataError
from tinylab.runs.durable import disk_error, failpoint, write_atomic
from tinylab.runs.folder import Run, step_name, step_of
from tinylab.runs.provenance import processor, processor_features, provenance
from tinylab.runs.sealed_log import stored_seals
from tinylab.training.job import Job

FREE_KEYS = (
    frozenset(f"parallel.{k}" for k in run_to_dict(Parallel(threads=1)) if k != "precision")
    | frozenset(f"faults.{k}" for k in run_to_dict(Faults()))
    | {"data.path", "saving.on_error"}
)
"""Keys that may change between two starts: the layout of the work, which shifts at most the last bits of the weights;
the place of the data, which their fingerprint in the checkpoint holds to be the same; what follows a step at fault or a
failed save."""


@contextmanager
def one_trainer(run: Run, context: Context) -> Iterator[None]:
    """Hold the run folder on rank 0, made if missing.

    Raises CheckpointError when another process trains in it, ConfigError for a new run among other files or with a name
    that is no name.
    """
    if not context.is_main:
        yield
        return
    run.require_place_of_its_own()
    try:
        run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(run.path, error) from error
    with run.lock():
        yield


def open_run(config: RunConfig, run: Run, context: Context) -> Path | None:
    """The checkpoint to go on from, None for a run without one; the same on every rank.

    Rank 0 makes a new folder, or refuses one of another configuration (ConfigError naming the keys), repairs what a
    kill left torn, and takes the newest checkpoint that holds.
    """
    check_ranks(config, context.world)
    step = 0
    if context.is_main:
        for file in (run.config_path, run.provenance_path, run.status_path, run.attention_path):
            for torn in run.path.glob(f".{file.name}.*.tmp"):
                torn.unlink()
        notes = run.journal_log.repair(stored_seals(run.checkpoints(), "journal"))
        repaired = bool(notes)
        run.clock.open(run.last_seen())
        if run.exists() and not _failed_before_it_began(run):
            _require_same(config, run)
        else:
            failpoint("open.locked")
            run.create(config, provenance())
            failpoint("open.created")
        run.checkpoints_path.mkdir(mode=0o700, exist_ok=True)
        checkpoint, damaged = latest_good(run)
        step = read_record(checkpoint)["step"] if checkpoint else 0
        notes += [*damaged, *_missing_checkpoints(config, run, step)]
        sealed = [p for p in run.checkpoints() if (step_of(p.name) or 0) <= step]
        found = run.metrics_log.repair(stored_seals(sealed, "metrics"))
        notes += found
        if repaired or found:
            run.write_journal("repaired", step=step, problems=notes)
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        if checkpoint:
            _require_own(config, checkpoint)
            prune(run, config)
        if step == config.steps:
            run.metrics_log.cut_after(step)
    step = context.sum_integers([step])[0]
    return run.checkpoints_path / step_name(step) if step else None


def _failed_before_it_began(run: Run) -> bool:
    """Whether a trainer was here and trained nothing: its configuration may be a mistake and may be replaced."""
    journal = run.journal()
    begun = bool(run.checkpoints()) or any(line["event"] == "started" for line in journal)
    return not begun and (bool(journal) or run.status()["state"] != "none")


def _missing_checkpoints(config: RunConfig, run: Run, step: int) -> list[str]:
    """A sentence on each checkpoint that was committed and that retention would keep, but that is not there.

    A journal without a `committed` line beside checkpoints was itself lost, and is mentioned.
    """
    journal, there = run.journal(), {step_of(p.name) for p in run.checkpoints()}
    committed = sorted({line["step"] for line in journal if line["event"] == "committed"})
    aside = {line.get("step") for line in journal if line["event"] == "quarantined"}
    regular = [s for s in committed if not is_permanent(config, s)]
    pruned = set(regular[: -config.saving.keep]) if config.saving.keep is not None else set()
    gone = [s for s in committed if s not in there | aside | pruned]
    notes = []
    if gone:
        names = ", ".join(map(step_name, gone[:5])) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
        notes.append(f"{run.checkpoints_path} lacks what was committed: {names}; the run continues after step {step}")
    if there and not any(line["event"] == "started" for line in journal):
        notes.append(f"{run.journal_path} does not say how the run began: earlier events are missing")
    return notes


def _require_same(config: RunConfig, run: Run) -> None:
    """Raise ConfigError naming every key that differs from the run's; a change of FREE_KEYS is written down instead."""
    before, now = flatten(run_to_dict(run.config)), flatten(run_to_dict(config))
    changed = {
        k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)
    }
    refused = {k: v for k, v in changed.items() if k not in FREE_KEYS}
    if refused:
        lines = [f"{key} = {_show(new)} asked, {_show(old)} in the run" for key, (old, new) in refused.items()]
        hint = " A run cannot be made longer or shorter." if any(k.endswith(".tokens") for k in refused) else ""
        raise ConfigError(
            f"{run.config_path} must equal the configuration asked for; {len(refused)} keys differ: "
            f"{'; '.join(lines)}.{hint} Choose another run folder, or repeat the run's own configuration"
        )
    if changed:
        write_atomic(run.config_path, run_to_toml(config))
        old, new = ({k: pair[i] for k, pair in changed.items()} for i in (0, 1))
        run.write_journal("changed", before=old, after=new, note="the last bits of the weights may differ")


def _require_own(config: RunConfig, checkpoint: Path) -> None:
    """Raise CheckpointError unless the checkpoint was written under this configuration (config.toml may be lost)."""
    record = read_record(checkpoint)
    if record.get("config_digest") != config_digest(config, record.get("config_digest_version", 1)):
        raise CheckpointError(
            f"{checkpoint} must come from the configuration asked for; it was written under another one. "
            "Restore the run's config.toml, or choose another run folder"
        )


def _show(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values by dotted key; items of lists by position."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    result: dict[str, Any] = {}
    for key, value in pairs:
        name = f"{prefix}{key}"
        result |= flatten(value, name + ".") if isinstance(value, dict | list) else {name: value}
    return result


def open_data(config: RunConfig, context: Context, checkpoint: Path | None, *, progress: bool) -> ShardSet:
    """The prepared data of the run, checked to fit it; rank 0 prepares them first if need be, the others wait.

    Raises DataError and CheckpointError as `prepare` and `require_fitting_data` do.
    """
    say = None if progress else lambda line: None
    shards = context.after_main(
        lambda: prepare(config.data, progress=say), lambda: open_shards(data_path(config.data)), "the data"
    )
    require_fitting_data(config, shards, checkpoint)
    return shards


def require_fitting_data(config: RunConfig, shards: ShardSet, checkpoint: Path | None) -> None:
    """Refuse data before the first step: DataError when vocabulary, sources or validation split do not fit,
    CheckpointError when they are not the data that the checkpoint was trained on."""
    if shards.vocab_size != config.model.vocab_size:
        raise DataError(
            f"the tokenizer of {shards.path} must have model.vocab_size = {config.model.vocab_size} entries; it has "
            f"{shards.vocab_size}. Set model.vocab_size and data.vocab_size to it, or prepare other data"
        )
    missing = [name for name in config.data.source_names if name not in shards.sources]
    if missing:
        raise DataError(f"{shards.path} must hold the sources of data.sources; it lacks {', '.join(missing)}")
    validation_windows(config, shards)
    trained_on = read_record(checkpoint)["data_fingerprint"] if checkpoint else shards.fingerprint
    if trained_on != shards.fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained on data with fingerprint {trained_on}; {shards.path} now has "
            f"{shards.fingerprint}. Restore those data, or start another run folder"
        )


def begin_lineage(job: Job, checkpoint: Path | None) -> None:
    """Rank 0: cut the metrics to the checkpoint's step and write `started` or `resumed` into the journal."""
    if not job.context.is_main:
        return
    record = read_record(checkpoint) if checkpoint else {}
    step = record.get("step", 0)
    layout = layout_of(job.config.parallel, job.context)
    journal, machine = job.run.journal(), {"processor": processor(), "features": " ".join(processor_features())}
    begun = checkpoint is not None or any(line["event"] == "started" for line in journal)
    repeated = job.log.cut_after(step)
    failpoint("begin.metrics_cut")
    fingerprint = job.shards.fingerprint
    more: dict[str, Any] = {"step": step, "tokens": job.config.tokens_at(step), "data_fingerprint": fingerprint}
    if begun:
        more["repeated_steps"] = len(repeated)
        more["repeated_s"] = round(sum(line.get("step_time_s") or 0.0 for line in repeated), 3)
        more["changed"] = {k: [record[k], v] for k, v in layout.items() if record.get(k, v) != v}
        more["changed"] |= _other_processor(journal, machine)
    job.run.write_journal("resumed" if begun else "started", **more, **layout, **machine, **job.run.clock.started())
    failpoint("begin.journaled")


def _other_processor(journal: Sequence[Mapping[str, Any]], machine: Mapping[str, str]) -> dict[str, list[str]]:
    """What of the processor differs from the one of the run's last start, said on standard error.

    Sums are made in an order that depends on its vector instructions: the samples of a step stay the same, the last
    bits of losses and weights may not.
    """
    before = next((line for line in reversed(journal) if "features" in line), {})
    changed = {k: [str(before[k]), v] for k, v in machine.items() if k in before and before[k] != v}
    if changed:
        old, new = set(str(before["features"]).split()), set(machine["features"].split())
        lost, gained = " ".join(sorted(old - new)) or "nothing", " ".join(sorted(new - old)) or "nothing"
        print(
            f"warning: the run was trained on {before.get('processor')} and continues on {machine['processor']}, which "
            f"lacks {lost} and adds {gained} of its features: the samples stay the same, the last bits of losses and "
            "weights may differ",
            file=sys.stderr,
        )
    return changed
