"""Verbs `train` and `runs`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from tinylab.cli.output import Answer, table
from tinylab.config import presets
from tinylab.config.counts import format_count, parse_count
from tinylab.config.io import load_run, override
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError, NothingFoundError, TinylabError
from tinylab.optim.schedule import check_schedule
from tinylab.runs.folder import Run, home, list_runs


def train_verb(
    run: Annotated[str, arg(metavar="RUN")],
    /,
    preset: str | None = None,
    config: str | None = None,
    tokens: str | None = None,
    save_every: str | None = None,
    seed: int | None = None,
    set: UseAppendAction[tuple[str, ...]] = (),
) -> Answer:
    """Start a run or resume it, by the same command. For a run that exists, `tinylab train RUN` is enough.

    Args:
        run: run folder, or a name below runs/.
        preset: configuration to start from: tiny (default), demo, tinyllama_120m, tinyllama_1b, tinyllama_v1_1.
        config: TOML file to start from, instead of a preset.
        tokens: length of the run over all ranks, such as 200K or 1.5B; stages and warm-up are scaled with it.
        save_every: tokens between checkpoints, such as 50K.
        seed: seed of initialization and data order.
        set: override of any key, such as optimizer.lr=1e-3; may be repeated for others.
    """
    folder = Run(run)
    resolved = resolve_config(folder, preset, config, tokens, save_every, seed, set)
    check_schedule(resolved)
    speaks = os.environ.get("RANK", "0") == "0"  # one rank of a torchrun job
    if speaks and not folder.exists():
        print(f"{folder.name}: {what_it_trains(resolved, tokens)}", file=sys.stderr, flush=True)
    from tinylab.training.loop import train

    train(resolved, folder)
    if not speaks:
        return Answer(None, "")
    summary = run_summary(folder)
    text = (
        f"{folder.path}: {summary['state']} at step {summary['step']} of {summary['steps']}, "
        f"{format_count(summary['tokens'])} tokens, loss {_number(summary['loss'])}, "
        f"validation {_number(summary['validation_loss'])} nats per token; {summary['checkpoints']} checkpoints"
    )
    return Answer(summary, text)


def what_it_trains(config: RunConfig, asked: str | None) -> str:
    """Length, stages, warm-up and checkpoints of a new run, `asked` being its --tokens: every stage is whole steps."""
    rounded = asked is not None and parse_count(asked) != config.tokens
    stages = (f"{s.name} {s.steps:,} × {s.batch_tokens:,}" for s in config.stages)
    return (
        f"{config.tokens:,} tokens{f' ({asked} asked for, rounded up to whole steps)' if rounded else ''}, "
        f"by stage (steps × tokens): {', '.join(stages)}; warm-up over {config.schedule.warmup_tokens:,} tokens, "
        f"a checkpoint every {config.saving.every_tokens:,} tokens"
    )


def resolve_config(
    run: Run,
    preset: str | None,
    config: str | None,
    tokens: str | None,
    save_every: str | None,
    seed: int | None,
    assignments: tuple[str, ...],
) -> RunConfig:
    """The configuration that these options describe: a preset or file, else that of an existing run, with changes.

    Raises ConfigError if they contradict one another. Whether an existing run may resume with it is decided by `train`.
    """
    if preset is not None and config is not None:
        raise ConfigError("give --preset or --config, not both: each is a complete configuration")
    if config is not None:
        base = load_run(config)
    elif preset is None and run.exists():
        base = run.config
    else:
        base = presets.preset(preset or "tiny")
    if tokens is not None:
        base = presets.scale_tokens(base, parse_count(tokens, "--tokens"))
    if save_every is not None:
        base = replace(base, saving=replace(base.saving, every_tokens=parse_count(save_every, "--save-every")))
    if seed is not None:
        base = replace(base, seed=seed)
    return override(base, assignments) if assignments else base


def runs_verb(root: Annotated[str | None, arg(metavar="FOLDER")] = None, /) -> Answer:
    """List runs with their state, progress and losses.

    Args:
        root: folder that contains run folders; default: runs/ in TINYLAB_HOME.
    """
    place = Path(root).expanduser().absolute() if root else home() / "runs"
    found = list_runs(place)
    if not found:
        raise NothingFoundError(f"{place} must contain run folders; found none. Start one: tinylab train mine")
    rows = [_row(r) for r in found]
    columns = ["run", "state", "step", "steps", "tokens", "loss", "validation_loss", "checkpoints"]
    return Answer(rows, table(rows, columns))


def _row(run: Run) -> dict[str, Any]:
    """The summary of a run; for one that cannot be read, only the reason, so that the others are still listed."""
    try:
        return run_summary(run)
    except (TinylabError, OSError) as error:
        print(f"warning: {run.name}: {error}", file=sys.stderr)
        return {"run": run.name, "path": str(run.path), "state": "unreadable", "error": str(error)}


def run_summary(run: Run) -> dict[str, Any]:
    """State and progress of a run: step, tokens, losses (nats per token), checkpoints, age of the heartbeat in s."""
    config, status, records = run.config, run.status(), run.metric_records()
    last = records[-1] if records else {}
    measured = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
    heartbeat = status.get("heartbeat")
    return {
        "run": run.name,
        "path": str(run.path),
        "preset": config.preset,
        "state": status["state"],
        "step": last.get("step", 0),
        "steps": config.steps,
        "tokens": last.get("tokens", 0),
        "loss": last.get("loss"),
        "validation_loss": measured[-1] if measured else None,
        "checkpoints": len(run.checkpoints()),
        "heartbeat_age_s": round(time.time() - heartbeat, 1) if heartbeat else None,
    }


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
