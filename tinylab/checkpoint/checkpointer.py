"""The training loop's only door to checkpoints: resume, save, poll, close.

Every rank calls the four at the same points of a run. `save` copies every rank's part of the state to rank 0 before it
returns. Rank 0 then writes, hashes and commits the copy, verifies it and prunes older checkpoints in a thread of its
own while the next steps go on, one save at a time.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from tinylab.checkpoint.retention import prune
from tinylab.checkpoint.state import TrainState, build_state, take_snapshot
from tinylab.checkpoint.store import Snapshot, commit_checkpoint
from tinylab.config.digest import DIGEST_VERSION, config_digest
from tinylab.config.schema import RunConfig
from tinylab.data.shards.reader import ShardSet
from tinylab.dist.context import Context
from tinylab.dist.parallel import layout_of
from tinylab.runs.durable import failpoint
from tinylab.runs.folder import Run, step_of
from tinylab.runs.metrics import MetricsLog


class Checkpointer:
    """Saves and resumes the run in `run`; `checkpoint` is the one to resume from, None for a fresh start."""

    def __init__(
        self, run: Run, config: RunConfig, context: Context, shards: ShardSet, checkpoint: Path | None
    ) -> None:
        self._run, self._config, self._context, self._shards = run, config, context, shards
        self._checkpoint = checkpoint
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpointer")
        self._saving: Future[Path] | None = None
        self._committed: list[Path] = []
        self.saved_step = (checkpoint and step_of(checkpoint.name)) or 0
        """Step of the newest checkpoint, committed or on its way; 0 before the first."""

    def resume(self) -> TrainState:
        """The state after the checkpoint, or the fresh one of step 0. Raises as `build_state`."""
        return build_state(self._config, self._context, self._checkpoint)

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint of `state`, which may change as soon as this returns. Waits for the save before it.

        Raises CheckpointError when that one failed; `poll`, `save` or `close` raise it for this one.
        """
        self._collect(wait=True)
        snapshot = take_snapshot(state, self._context, self._record(state))
        self.saved_step = state.step
        if snapshot is not None:
            self._saving = self._worker.submit(self._commit, snapshot)

    def poll(self) -> list[Path]:
        """On rank 0: the checkpoints committed since the last call. Raises CheckpointError when a save failed."""
        self._collect(wait=False)
        committed, self._committed = self._committed, []
        return committed

    def close(self) -> list[Path]:
        """Wait, on every rank, until the save in flight is committed; what `poll` returns. Raises as `poll`."""
        self._collect(wait=True)
        self._context.wait()
        return self.poll()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown()  # a save in flight ends, whatever ended the run

    def _collect(self, *, wait: bool) -> None:
        if self._saving is not None and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            self._committed.append(saving.result())

    def _commit(self, snapshot: Snapshot) -> Path:
        MetricsLog(self._run.metrics_path).sync()  # the lines of the steps that the checkpoint covers
        failpoint("save.metrics_synced")
        folder = commit_checkpoint(self._run, snapshot, self._config.model, self._shards)
        prune(self._run, self._config)
        return folder

    def _record(self, state: TrainState) -> dict[str, Any]:
        """The plain values of `trainer.json`."""
        config, tokenizer = self._config, self._shards.manifest["tokenizer"]
        return {
            "step": state.step,
            "tokens": config.tokens_at(state.step),
            "stage": config.stages[config.stage_index(state.step)].name,
            "hours": state.hours,
            **layout_of(config.parallel, self._context),
            "data_fingerprint": self._shards.fingerprint,
            "tokenizer_hash": tokenizer["hash"],
            "boundary": tokenizer["boundary"],
            "config_digest": config_digest(config),
            "config_digest_version": DIGEST_VERSION,
        }
