"""When a run saves, and which of its checkpoints stay."""

from __future__ import annotations

import sys
from pathlib import Path

from tinylab.checkpoint.store import problems_of, remove
from tinylab.config.schema import RunConfig
from tinylab.errors import CheckpointError
from tinylab.runs.durable import failpoint
from tinylab.runs.folder import Run, step_of
from tinylab.runs.manifest import MANIFEST, sha256_file, temporary_path


def early_steps(config: RunConfig) -> list[int]:
    """Steps 1, 2, 4, 8, … below the first regular checkpoint; none when `saving.early` is off."""
    steps, step = [], 1
    while config.saving.early and step <= config.steps and config.tokens_at(step) < config.saving.every_tokens:
        steps.append(step)
        step *= 2
    return steps


def is_permanent(config: RunConfig, step: int) -> bool:
    """Whether `step` is an early one or the end of a stage: retention never removes its checkpoint."""
    return step in early_steps(config) or any(step == last for _, last in config.stage_bounds())


def saves_at(config: RunConfig, step: int) -> bool:
    """Whether the run commits a checkpoint after `step`: a permanent one, or where it crosses saving.every_tokens."""
    every = config.saving.every_tokens
    return config.tokens_at(step) // every > config.tokens_at(step - 1) // every or is_permanent(config, step)


Verified = dict[Path, str]
"""Checkpoints that this process has read back and found equal to their manifest, each with its manifest's SHA-256."""


def prune(run: Run, config: RunConfig, verified: Verified | None = None) -> list[int]:
    """Remove what is older than the newest `saving.keep` checkpoints that hold, but permanent ones; the steps removed.

    A checkpoint holds if it was read back and equals its manifest: in this call, or before if it is in `verified`,
    which learns what was read. Others count for nothing. Raises CheckpointError, with nothing removed, when the newest
    checkpoint does not hold.
    """
    verified = {} if verified is None else verified
    folders = run.checkpoints()
    regular = [p for p in folders if not is_permanent(config, step_of(p.name) or 0)]
    keep = config.saving.keep
    if keep is None or len(regular) <= keep:
        return []
    problems = _problems(folders[-1], verified)
    if problems:
        raise CheckpointError(
            f"{folders[-1]} must equal its manifest right after its commit; found {'; '.join(problems)}. "
            "No older checkpoint was removed. Check the disk and repeat the same command"
        )
    failpoint("prune.verified")
    surplus: list[Path] = []
    holding = 0
    for position in reversed(range(len(regular))):
        if holding == keep:
            surplus = regular[: position + 1]
            break
        holding += not _problems(regular[position], verified)
    for folder in surplus:
        doomed = temporary_path(folder)
        try:
            folder.rename(doomed)
        except OSError as error:
            print(f"warning: cannot remove {folder}: {error.strerror}", file=sys.stderr)
            continue
        verified.pop(folder, None)
        failpoint("prune.renamed")
        remove(doomed)
        failpoint("prune.removed")
    return [step_of(p.name) or 0 for p in surplus]


def _problems(folder: Path, verified: Verified) -> list[str]:
    """As `problems_of`, but nothing is read again of a folder whose manifest is the one that it was compared with."""
    try:
        digest = sha256_file(folder / MANIFEST)
    except OSError:
        digest = ""
    if digest and verified.get(folder) == digest:
        return []
    problems = problems_of(folder)
    if not problems:
        verified[folder] = digest
    return problems
