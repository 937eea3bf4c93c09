"""When a run saves, and which of its checkpoints stay."""

from __future__ import annotations

import sys

from tinylab.checkpoint.store import problems_of, remove
from tinylab.config.schema import RunConfig
from tinylab.errors import CheckpointError
from tinylab.runs.durable import failpoint
from tinylab.runs.folder import Run, step_of
from tinylab.runs.manifest import temporary_path


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


def prune(run: Run, config: RunConfig) -> list[int]:
    """Remove the checkpoints that are not permanent, all but the newest `saving.keep`, and return their steps.

    Removes only what is older than a checkpoint that was read back and equals its manifest.
    Raises CheckpointError, with nothing removed, when the newest one does not.
    """
    folders = run.checkpoints()
    regular = [p for p in folders if not is_permanent(config, step_of(p.name) or 0)]
    surplus = regular[: -config.saving.keep] if config.saving.keep is not None else []
    if not surplus:
        return []
    problems = problems_of(folders[-1])
    if problems:
        raise CheckpointError(
            f"{folders[-1]} must equal its manifest right after its commit; found {'; '.join(problems)}. "
            "No older checkpoint was removed. Check the disk and repeat the same command"
        )
    failpoint("prune.verified")
    for folder in surplus:
        doomed = temporary_path(folder)
        try:
            folder.rename(doomed)
        except OSError as error:
            print(f"warning: cannot remove {folder}: {error.strerror}", file=sys.stderr)
            continue
        failpoint("prune.renamed")
        remove(doomed)
        failpoint("prune.removed")
    return [step_of(p.name) or 0 for p in surplus]
