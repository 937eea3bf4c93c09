"""Verb `train`, and the options that describe a configuration."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from tinylab.cli.output import Answer
from tinylab.config import presets
from tinylab.config.counts import format_count, parse_count
from tinylab.config.io import load_run, override
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError
from tinylab.optim.schedule import check_schedule
from tinylab.runs.folder import Run
from tinylab.runs.summary import run_summary


@dataclass(frozen=True)
class Configuration:
    """Which configuration a run has: the options of `train` and `launch`."""

    preset: Annotated[str | None, arg(help_behavior_hint="")] = None
    """Configuration to start from: tiny (default), demo, tinyllama_120m, tinyllama_1b, tinyllama_v1_1."""
    config: Annotated[str | None, arg(help_behavior_hint="")] = None
    """TOML file to start from, instead of a preset."""
    tokens: Annotated[str | None, arg(help_behavior_hint="")] = None
    """Length of the run over all ranks, such as 200K or 1.5B; stages and warm-up are scaled with it."""
    save_every: Annotated[str | None, arg(help_behavior_hint="")] = None
    """Tokens between checkpoints, such as 50K."""
    seed: Annotated[int | None, arg(help_behavior_hint="")] = None
    """Seed of initialization and data order."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(help_behavior_hint="")] = ()
    """Override of any key, such as optimizer.lr=1e-3; may be repeated for others."""


Options = Annotated[Configuration, arg(name=""), OmitArgPrefixes]
AS_IT_IS = Configuration()
"""No option given: a run's own configuration, or the preset tiny."""


def train_verb(run: Annotated[str, arg(metavar="RUN")], /, options: Options = AS_IT_IS) -> Answer:
    """Start a run or resume it, by the same command. For a run that exists, `tinylab train RUN` is enough.

    Args:
        run: run folder, or a name below runs/.
    """
    folder = Run(run)
    resolved = resolve_config(folder, options)
    speaks = os.environ.get("RANK", "0") == "0"  # one rank of a torchrun job
    if speaks:
        announce(folder, resolved, options.tokens)
    from tinylab.training.loop import train

    train(resolved, folder)
    if not speaks:
        return Answer(None, "")
    summary = run_summary(folder)
    return Answer(summary, summary_line(summary) + f"; {summary['checkpoints']} checkpoints")


def announce(run: Run, config: RunConfig, asked: str | None) -> None:
    """Say what a new run will train before it starts."""
    if not run.exists():
        print(f"{run.name}: {what_it_trains(config, asked)}", file=sys.stderr, flush=True)


def summary_line(summary: dict[str, Any]) -> str:
    """Where a run is, in one line."""
    return (
        f"{summary['path']}: {summary['state']} at step {summary['step']} of {summary['steps']}, "
        f"{format_count(summary['tokens'])} tokens, loss {_number(summary['loss'])}, "
        f"validation {_number(summary['validation_loss'])} nats per token"
    )


def what_it_trains(config: RunConfig, asked: str | None) -> str:
    """Length, stages, warm-up and checkpoints of a new run, `asked` being its --tokens: every stage is whole steps."""
    rounded = asked is not None and parse_count(asked) != config.tokens
    stages = (f"{s.name} {s.steps:,} × {s.batch_tokens:,}" for s in config.stages)
    return (
        f"{config.tokens:,} tokens{f' ({asked} asked for, rounded up to whole steps)' if rounded else ''}, "
        f"by stage (steps × tokens): {', '.join(stages)}; warm-up over {config.schedule.warmup_tokens:,} tokens, "
        f"a checkpoint every {config.saving.every_tokens:,} tokens"
    )


def resolve_config(run: Run, options: Configuration) -> RunConfig:
    """The configuration that these options describe: a preset or file, else that of an existing run, with changes.

    Raises ConfigError if they contradict one another. Whether an existing run may resume with it is decided by `train`.
    """
    if options.preset is not None and options.config is not None:
        raise ConfigError("give --preset or --config, not both: each is a complete configuration")
    if options.config is not None:
        base = load_run(options.config)
    elif options.preset is None and run.exists():
        base = run.config
    else:
        base = presets.preset(options.preset or "tiny")
    if options.tokens is not None:
        base = presets.scale_tokens(base, parse_count(options.tokens, "--tokens"))
    if options.save_every is not None:
        every_tokens = parse_count(options.save_every, "--save-every")
        base = replace(base, saving=replace(base.saving, every_tokens=every_tokens))
    if options.seed is not None:
        base = replace(base, seed=options.seed)
    config = override(base, options.set) if options.set else base
    check_schedule(config)
    return config


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
