"""Checkpoints of a run on disk: committed, found again, verified before use, set aside when damaged.

    checkpoints/step-00000500/
        config.json, model*.safetensors, tokenizer …    a Hugging Face model folder
        trainer/optimizer.safetensors                   the optimizer's tensors, by parameter
        trainer/rng.safetensors                         random number generators, by rank
        trainer/trainer.json                            plain values: step, tokens, stage, fingerprints …
        manifest.json                                   bytes and SHA-256 of every file

Nothing is pickled. Steps are compared as integers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylab.checkpoint.parts import join_optimizer, join_weights
from tinylab.checkpoint.snapshot import Snapshot
from tinylab.config.architecture import Model
from tinylab.data.shards.reader import ShardSet
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.runs.durable import disk_error, failpoint, fsync_path
from tinylab.runs.folder import Run, step_name, step_of
from tinylab.runs.manifest import TEMPORARY_PREFIX, commit_folder, temporary_folder, verify_folder
from tinylab.runs.regular import read_regular

FORMAT_VERSION = 1
"""Of `trainer/`; a folder of another version is refused."""
QUARANTINE = "quarantine"
OPTIMIZER_FILE, RNG_FILE = "optimizer.safetensors", "rng.safetensors"
_PARTS = "parts"
"""Folder of what each rank wrote; gone before the commit."""
_SPARE = 1.05
"""Room asked for before a save, as a multiple of the files' bytes."""
_SMALL_FILES = 65_536
"""Bytes of configuration, index and manifest, and of every file's last block."""


def commit_checkpoint(
    run: Run, snapshot: Snapshot, model: Model, shards: ShardSet, gather: Callable[[Path], None] | None = None
) -> Path:
    """Commit the checkpoint of `snapshot.record["step"]` with its journal line, and return its folder.

    The tokenizer's files of `shards` are copied beside the weights. With `gather` the snapshot is one rank's: `gather`
    returns when every rank has written its rows into the folder that it is given.
    Raises CheckpointError naming the path and the room needed and free when it cannot be written; what was committed
    before stays as it is, and nothing appears under the final name.
    """
    step = snapshot.record["step"]
    target = run.checkpoints_path / step_name(step)
    needed = snapshot.total_bytes or sum(t.nbytes for s in (snapshot.weights, snapshot.optimizer) for t in s.values())
    needed *= 1 if gather is None else 2  # the rows of each rank, then the files made of them
    needed += sum(t.nbytes for t in snapshot.rng.values()) + _SMALL_FILES
    needed += sum(f.stat().st_size for f in shards.tokenizer_path.iterdir())
    _require_room(target, int(needed * _SPARE))
    temporary = temporary_folder(target)
    failpoint("save.begun")
    try:
        parts = None
        if gather is not None:
            parts = temporary / _PARTS
            parts.mkdir()
            gather(parts)
        _fill(temporary, snapshot, model, shards, parts)
        run.require_place()
        commit_folder(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(target, error, needed) from error
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    blocked = round(snapshot.blocked_s, 4)
    run.write_journal("committed", step=step, tokens=snapshot.record["tokens"], blocked_s=blocked)
    failpoint("save.journaled")
    return target


def _fill(folder: Path, snapshot: Snapshot, model: Model, shards: ShardSet, parts: Path | None) -> None:
    """Write every file of a checkpoint but its manifest; `parts` is removed when the files are made of it."""
    if parts is None:
        save_weights(snapshot.weights, model, folder)
    else:
        join_weights(parts, model, folder)
    failpoint("save.weights_written")
    ids = shards.manifest["tokenizer"]
    write_config(model, folder, bos_id=ids["bos_id"], eos_id=ids["eos_id"])
    for file in sorted(shards.tokenizer_path.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    trainer = folder / "trainer"
    trainer.mkdir()
    if parts is None:
        save_file(_contiguous(snapshot.optimizer), trainer / OPTIMIZER_FILE)
    else:
        join_optimizer(parts, snapshot.shapes, trainer / OPTIMIZER_FILE)
        shutil.rmtree(parts)
    failpoint("save.optimizer_written")
    save_file(_contiguous(snapshot.rng), trainer / RNG_FILE)
    record = {"format_version": FORMAT_VERSION, **snapshot.record}
    (trainer / "trainer.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    failpoint("save.trainer_written")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _require_room(target: Path, needed: int) -> None:
    """Raise CheckpointError before the first byte when the disk cannot hold the checkpoint."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise CheckpointError(
            f"cannot write {target}: about {needed} bytes needed, {free} bytes free; "
            "make room and repeat the same command"
        )


def latest_good(run: Run) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that equals its manifest (None before the first save), and what was done on the way.

    A damaged one is moved to RUN/quarantine/, never deleted, and the next older one is tried. A complete folder whose
    `committed` line is missing (a kill in between) gets it. Leftovers of killed saves are removed.
    Raises CheckpointError when checkpoints were committed but none is left that holds.
    """
    _remove_leftovers(run)
    notes: list[str] = []
    journal = run.journal()
    for folder in sorted(_step_folders(run), key=_step, reverse=True):
        problems = problems_of(folder)
        if problems:
            notes.append(_set_aside(run, folder, problems))
            failpoint("resume.set_aside")
            continue
        record = read_record(folder)
        if not any(line["event"] == "committed" and line.get("step") == record["step"] for line in journal):
            run.write_journal("committed", step=record["step"], tokens=record["tokens"], recovered=True)
            failpoint("resume.journaled")
        return folder, notes
    if any(line["event"] == "committed" for line in journal):
        raise CheckpointError(
            f"{run.path} must hold at least one undamaged checkpoint to go on from; found none: "
            + ("; ".join(notes) or f"{run.checkpoints_path} is empty although the journal names committed ones")
            + ". Restore one from a copy, or start anew in another run folder"
        )
    return None, notes


def _step_folders(run: Run) -> list[Path]:
    return [p for p in run.checkpoints_path.iterdir() if step_of(p.name) is not None and p.is_dir()]


def _step(folder: Path) -> int:
    return step_of(folder.name) or 0


def problems_of(folder: Path) -> list[str]:
    """Why a checkpoint must not be used; empty when it holds."""
    try:
        problems = verify_folder(folder)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}; check the path and its permissions") from error
    if not problems and (step := read_record(folder)["step"]) != _step(folder):
        problems = [f"{folder / 'trainer' / 'trainer.json'}: step {step} in a folder of another"]
    return problems


def _set_aside(run: Run, folder: Path, problems: list[str]) -> str:
    """Move a damaged checkpoint out of the way, with a journal line; returns what to tell the user."""
    place = run.path / QUARANTINE / folder.name
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{folder.name}.{number}")
    try:
        place.parent.mkdir(exist_ok=True)
        shutil.move(folder, place)  # copies where checkpoints/ is a link to another disk
        fsync_path(folder.parent)
        fsync_path(place.parent)
    except OSError as error:
        raise disk_error(place, error) from error
    run.write_journal("quarantined", step=_step(folder), problems=problems[:20])
    return f"{folder.name} is damaged ({'; '.join(problems[:3])}) and was moved to {place}"


def _remove_leftovers(run: Run) -> None:
    """Remove what a killed save or prune left behind, on any host: the caller holds the lock of the run."""
    for path in run.checkpoints_path.glob(f"{TEMPORARY_PREFIX}*"):
        remove(path)
    failpoint("resume.cleaned")


def remove(path: Path) -> None:
    """Delete a folder, or warn that it could not be deleted: the run does not end for that."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        print(f"warning: cannot remove {path}: {error.strerror}; remove it by hand", file=sys.stderr)


def read_record(folder: Path) -> dict[str, Any]:
    """`trainer.json` of a checkpoint. Raises CheckpointError when it is missing, malformed or of another version."""
    path = folder / "trainer" / "trainer.json"
    try:
        record = json.loads(read_regular(path, follow=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be readable JSON; found: {error}. Use another checkpoint") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must have format_version {FORMAT_VERSION}; found {version}. Resume with the tinylab that wrote it"
        )
    if missing := sorted({"step", "tokens"} - record.keys()):
        raise CheckpointError(f"{path} must have {', '.join(missing)}; found none. Use another checkpoint")
    return record


def load_rng(folder: Path) -> dict[str, Tensor]:
    """The states of the random generators of a verified checkpoint. Raises CheckpointError if they cannot be read."""
    path = folder / "trainer" / RNG_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must hold readable safetensors; found: {error}") from error


@contextmanager
def open_optimizer(folder: Path) -> Iterator[dict[str, Any]]:
    """The optimizer's tensors of a verified checkpoint, not read yet: `tensors[name][first:end]` reads rows of one.

    Raises CheckpointError if they cannot be read.
    """
    path = folder / "trainer" / OPTIMIZER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            yield {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must hold readable safetensors; found: {error}") from error
