"""The recipe of a run, top to bottom: data, state, steps, validation, metrics, checkpoints, end.

One function starts a run and resumes it. Killed at any moment and called again with the same configuration, it
continues from the last committed checkpoint and ends bit-equal to the run that was never killed (same machine, same
ranks).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from tinylab.checkpoint.checkpointer import Checkpointer
from tinylab.checkpoint.retention import saves_at
from tinylab.checkpoint.state import TrainState
from tinylab.config.schema import RunConfig
from tinylab.data.loader import Loader, StepBatch
from tinylab.dist.context import Context, open_context, other_ranks_alive
from tinylab.errors import RunStopped, TinylabError
from tinylab.model.attention import BACKENDS
from tinylab.model.precision import resolve_precision
from tinylab.optim.schedule import check_schedule, lr_at
from tinylab.runs.durable import failpoint
from tinylab.runs.folder import Run, step_of
from tinylab.training.attention import choose_backend, keep_choice
from tinylab.training.hooks import Heartbeat, Hook, Hooks, StopRequest, progress_hooks
from tinylab.training.job import Job
from tinylab.training.meter import Meter
from tinylab.training.opening import begin_lineage, one_trainer, open_data, open_run
from tinylab.training.step import agree, train_step
from tinylab.training.validation import Validator


def train(config: RunConfig, run: Run, *, progress: bool = True, hooks: Sequence[Hook] = ()) -> Run:
    """Run or resume `config` in the folder `run`, in this process (or on this rank of a torchrun job), to its end.

    A finished run says so and is left as it is. `hooks` are called on rank 0, after the heartbeat and progress line.
    Raises ConfigError for a folder of another configuration, DataError and CheckpointError for what is missing,
    damaged or does not fit, RunStopped after a signal or a stop request, when a checkpoint is committed.
    """
    check_schedule(config)
    with StopRequest(run) as stop, open_context(config.parallel) as context, one_trainer(run, context):
        if context.is_main:
            stop.forget_file()
        attention = choose_backend(config, run, context)  # before a run begins that cannot go on
        checkpoint = open_run(config, run, context)
        heartbeat = Heartbeat(run, config, (checkpoint and step_of(checkpoint.name)) or 0)
        with _reported(run, context, heartbeat):
            if heartbeat.at == config.steps:
                if context.is_main:
                    print(f"{run.path} is finished: step {config.steps}, {config.tokens:,} tokens", file=sys.stderr)
                return run
            shards = open_data(config, context, checkpoint, progress=progress)
            job = Job(config=config, run=run, context=context, shards=shards)
            called = [heartbeat, *progress_hooks(progress), *hooks] if context.is_main else []
            with (
                Checkpointer(run, config, context, shards, checkpoint) as checkpointer,
                # Its threads hash and read the first shards while the model is built.
                Loader(
                    config,
                    shards,
                    rank=context.rank,
                    world=context.world,
                    start_step=checkpointer.saved_step + 1,
                ) as loader,
            ):
                state = checkpointer.resume()
                state.model.attention = BACKENDS[attention["name"]]
                begin_lineage(job, checkpoint)
                if context.is_main:
                    keep_choice(attention, run)
                with other_ranks_alive(context, lambda: state.step), Hooks(called, job, state.step) as told:
                    stop.defer()
                    _steps(job, state, loader, stop, checkpointer, told)
    return run


def _steps(
    job: Job,
    state: TrainState,
    loader: Iterable[StepBatch],
    stop: StopRequest,
    checkpointer: Checkpointer,
    hooks: Hooks,
) -> None:
    """Every step that is left, each with its line of metrics, and the checkpoints between them."""
    config, context = job.config, job.context
    precision = resolve_precision(context.device, config.parallel.precision)
    validator = Validator(config, job.shards, context, precision)
    meter = Meter(config, context)
    for batch in meter.timed(loader):
        hooks.checkpoints(checkpointer.poll())
        data_hash, targets, stopping = agree(context, batch, stop.requested() or checkpointer.failed)
        if stopping:
            if checkpointer.saved_step != state.step:
                checkpointer.save(state)
            hooks.checkpoints(checkpointer.close())
            raise stop.stopped(f"after step {state.step} of {config.steps}")
        _announce_stage(job, batch.step)
        lr = lr_at(config, batch.step)
        clip_norm = config.optimizer.clip_norm
        result = train_step(
            state, batch.micro_batches, targets, lr=lr, clip_norm=clip_norm, precision=precision, context=context
        )
        record = meter.record(state, result, lr, data_hash) | validator.after(state.model, state.step)
        if context.is_main:
            job.run.require_place()
            job.log.append(record)
            failpoint("step.logged")
        hooks.step(record)
        if saves_at(config, state.step):
            checkpointer.save(state)
    hooks.checkpoints(checkpointer.close())


def _announce_stage(job: Job, step: int) -> None:
    """Write the journal line of the stage that begins with `step`, if one does."""
    config = job.config
    for stage, (first, _) in zip(config.stages, config.stage_bounds(), strict=True):
        if job.context.is_main and step == first:
            job.run.write_journal("stage", stage=stage.name, step=step - 1, tokens=config.tokens_at(step - 1))


@contextmanager
def _reported(run: Run, context: Context, heartbeat: Heartbeat) -> Iterator[None]:
    """Say in status and journal how the run goes and how it ends: done, stopped or failed."""
    if not context.is_main:
        yield
        return
    heartbeat.write("running")
    try:
        with heartbeat.beating():
            yield
        event, error = "done", None
    except RunStopped as stopped:
        event, error = "stopped", stopped
    except BaseException as failure:
        event, error = "failed", failure
    more: dict[str, Any] = {"reason": str(error) or type(error).__name__} if error else {}
    journaled = event == "done" and any(line["event"] == "done" for line in run.journal()[-1:])
    # What ended the run is the news: a disk too full to write it down must not hide it.
    with suppress(TinylabError) if error else nullcontext():
        heartbeat.write(event, **more)
        failpoint("end.status_written")
        if not journaled:
            run.write_journal(event, step=heartbeat.at, tokens=heartbeat.tokens, **more)
    if error:
        raise error
