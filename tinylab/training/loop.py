"""The recipe of a run, top to bottom: data, state, steps, validation, metrics, checkpoints, end.

One function starts a run and resumes it. Killed at any moment and called again with the same configuration, it
continues from the last committed checkpoint and ends bit-equal to the run that was never killed (same machine, same
ranks).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
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
from tinylab.training.faults import NOT_COMPUTED, Guard
from tinylab.training.hooks import Heartbeat, Hook, Hooks, progress_hooks
from tinylab.training.job import Job
from tinylab.training.meter import Meter
from tinylab.training.opening import begin_lineage, one_trainer, open_data, open_run
from tinylab.training.step import agree, train_step
from tinylab.training.stop import StopRequest
from tinylab.training.validation import Validator


def train(config: RunConfig, run: Run, *, progress: bool = True, hooks: Sequence[Hook] = ()) -> Run:
    """Run or resume `config` in the folder `run`, in this process (or on this rank of a torchrun job), to its end.

    A finished run says so and is left as it is. `hooks` are called on rank 0, after the heartbeat and progress line.
    Raises ConfigError for a folder of another configuration, DataError and CheckpointError for what is missing,
    damaged or does not fit, RunStopped after a signal or a stop request, when a checkpoint is committed.
    """
    check_schedule(config)
    with (
        StopRequest(run) as stop,
        stop.unwrapped(),
        open_context(config.parallel, stop.launcher_gone) as context,
        one_trainer(run, context),
    ):
        if context.is_main:
            stop.forget_old_file()
        new = context.sum_integers([int(context.is_main and not run.exists())])[0]
        attention = choose_backend(config, run, context) if new else {}  # before a run begins that cannot go on
        checkpoint = open_run(config, run, context)
        heartbeat = Heartbeat(run, config, _step_of(checkpoint), context.world)
        if not attention and heartbeat.at < config.steps:
            attention = choose_backend(config, run, context)
        with _reported(run, context, heartbeat), stop.unwrapped(), other_ranks_alive(context):
            if heartbeat.at == config.steps:
                if context.is_main:
                    print(f"{run.path} is finished: step {config.steps}, {config.tokens:,} tokens", file=sys.stderr)
                return run
            shards = open_data(config, context, checkpoint, progress=progress)
            job = Job(config=config, run=run, context=context, shards=shards)
            called = [heartbeat, *progress_hooks(progress), *hooks] if context.is_main else []
            while _train_from(checkpoint, job, attention, stop, called):  # until the end, unless a fault rewinds
                gc.collect()  # the state before the rewind
                job = replace(job, context=job.context.without_notes())  # those on its saves
                checkpoint = open_run(config, run, context)
                heartbeat.at = _step_of(checkpoint)
    return run


def _step_of(checkpoint: Path | None) -> int:
    return (checkpoint and step_of(checkpoint.name)) or 0


def _train_from(
    checkpoint: Path | None, job: Job, attention: dict[str, Any], stop: StopRequest, called: Sequence[Hook]
) -> bool:
    """Train from `checkpoint` (None: from the start) to the end of the run; True where a fault must rewind it."""
    config, run, context, shards = job.config, job.run, job.context, job.shards
    start = _step_of(checkpoint) + 1
    with (
        Checkpointer(run, config, context, shards, checkpoint) as checkpointer,
        # Its threads hash and read the first shards while the model is built.
        Loader(config, shards, rank=context.rank, world=context.world, start_step=start) as loader,
    ):
        state = checkpointer.resume()
        state.model.attention = BACKENDS[attention["name"]]
        begin_lineage(job, checkpoint)
        if context.is_main:
            keep_choice(attention, run)
        with Hooks(called, job, state.step) as told:
            stop.defer(looks_for_file=context.is_main)
            return _steps(job, state, loader, stop, checkpointer, told)


def _steps(
    job: Job,
    state: TrainState,
    loader: Iterable[StepBatch],
    stop: StopRequest,
    checkpointer: Checkpointer,
    hooks: Hooks,
) -> bool:
    """Every step that is left, each with its line of metrics, and the checkpoints between them.

    True where a step at fault asks for a rewind, when all that was to be saved is committed.
    """
    config, context = job.config, job.context
    precision = resolve_precision(context.device, config.parallel.precision)
    validator = Validator(config, job.shards, context, precision)
    meter = Meter(config, context)
    guard = Guard(job, state)
    first = state.step + 1
    for batch in meter.timed(loader):
        hooks.checkpoints(checkpointer.poll())
        context.watch.await_others(state.step)
        data_hash, targets, reason = agree(context, batch, stop.requested() or int(checkpointer.failed))
        if reason:
            stop.reason = reason
            if checkpointer.saved_step != state.step:
                checkpointer.save(state)
            hooks.checkpoints(checkpointer.close())
            raise stop.stopped(f"after step {state.step} of {config.steps}")
        _announce_stage(job, batch.step)
        lr = lr_at(config, batch.step)
        if guard.leaves_out(batch.step):
            result = NOT_COMPUTED
        else:
            result = train_step(
                state,
                batch.micro_batches,
                targets,
                lr=lr,
                clip_norm=config.optimizer.clip_norm,
                precision=precision,
                context=context,
                judge=guard.judge,
            )
        rewind = guard.settle(result, data_hash, batch.micro_batches, targets, precision)
        context.watch.reached(state.step)
        if rewind:
            hooks.checkpoints(checkpointer.close())
            return True
        record = meter.record(state, result, lr, data_hash) | validator.after(state.model, state.step)
        if context.is_main:
            job.run.require_place()
            job.log.append(record)
            failpoint("step.logged")
        hooks.step(record)
        if state.step == first:  # compiled and measured by now
            context.expect_steps(config.parallel.timeout_s)
        if saves_at(config, state.step):
            checkpointer.save(state)
    hooks.checkpoints(checkpointer.close())
    return False


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

    def write_end(event: str, error: BaseException | None) -> None:
        more = {"reason": str(error) or type(error).__name__} if error else {}
        # What ended the run is the news: a disk too full to write it down must not hide it.
        with suppress(TinylabError) if error else nullcontext():
            heartbeat.write(event, **more)
            failpoint("end.status_written")
        with suppress(TinylabError) if error else nullcontext():
            run.require_place()
            if error or not any(line["event"] == "done" for line in run.journal()[-1:]):
                run.write_journal(event, step=heartbeat.at, tokens=heartbeat.tokens, **more)

    context.watch.last_words = lambda error: write_end("failed", error)
    heartbeat.show_running()
    try:
        with heartbeat.beating():
            yield
    except RunStopped as stopped:
        write_end("stopped", stopped)
        raise
    except BaseException as failure:
        write_end("failed", failure)
        raise
    write_end("done", None)
