"""The training loop's only door to checkpoints: resume, save, poll, close.

Every rank calls the four at the same points of a run. `save` returns when each rank has copied what it will write into
its CPU's memory. A thread of every rank then writes the copy while the next steps run, one save at a time; rank 0's
hashes and commits it, and prunes older checkpoints. A save that fails is reported at once and repeated; after that the
run stops, on all ranks at the same step, or continues, as `saving.on_error` says.
"""

from __future__ import annotations

import socket
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from tinylab.checkpoint.parts import write_parts
from tinylab.checkpoint.peers import PeerGoneError, Peers
from tinylab.checkpoint.retention import Verified, prune
from tinylab.checkpoint.snapshot import Snapshot, SnapshotMemory, take_snapshot
from tinylab.checkpoint.state import TrainState, build_state, optimizer_tensors
from tinylab.checkpoint.store import commit_checkpoint
from tinylab.config.digest import DIGEST_VERSION, config_digest
from tinylab.config.schema import RunConfig
from tinylab.data.shards.reader import ShardSet
from tinylab.dist.context import Context
from tinylab.dist.parallel import layout_of
from tinylab.errors import CheckpointError
from tinylab.runs.durable import disk_error, failpoint
from tinylab.runs.folder import Run, step_of

PAUSES_S = (1.0, 5.0)
"""Before each repeat of a save that failed."""
_POLL_S = 0.02
"""How often ranks that wait for a save ask each other whether it is done."""


class Checkpointer:
    """Saves and resumes the run in `run`; `checkpoint` is the one to resume from, None for a fresh start."""

    def __init__(
        self, run: Run, config: RunConfig, context: Context, shards: ShardSet, checkpoint: Path | None
    ) -> None:
        self._run, self._config, self._context, self._shards = run, config, context, shards
        self._checkpoint = checkpoint
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpointer")
        self._peers = Peers(context)
        self._memory = SnapshotMemory()
        self._verified: Verified = {}
        self._saving: Future[Path | None] | None = None
        self._saves = 0
        self._failure: CheckpointError | None = None
        self._committed: list[Path] = []
        self.saved_step = (checkpoint and step_of(checkpoint.name)) or 0
        """Step of the newest checkpoint, committed or on its way; 0 before the first."""

    def resume(self) -> TrainState:
        """The state after the checkpoint, or the fresh one of step 0. Raises as `build_state`."""
        return build_state(self._config, self._context, self._checkpoint)

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint of `state`, which may change as soon as this returns. Waits for the save before it.

        Raises CheckpointError when that one failed and `saving.on_error` is "stop"; `poll`, `save` or `close` raise it
        for this one.
        """
        began = time.perf_counter()
        self._wait()
        if self._config.saving.on_error == "stop":
            self._raise_failure()
        self._failure = None
        weights, optimizer = dict(state.model.named_parameters()), optimizer_tensors(state)
        seals = self._run.seal() if self._context.is_main else {}
        record = self._record(state) | {"optimizer_tensors": len(optimizer)} | seals
        snapshot = take_snapshot(weights, optimizer, self._context, record, self._memory)
        snapshot.blocked_s = time.perf_counter() - began
        self.saved_step = state.step
        self._saves += 1
        self._saving = self._worker.submit(self._save, snapshot, self._saves)

    def poll(self) -> list[Path]:
        """On rank 0: the checkpoints committed since the last call.

        Raises CheckpointError in a single process when a save failed and `saving.on_error` is "stop"; several ranks
        agree first, see `failed`.
        """
        self._collect()
        if self._context.world == 1 and self.failed:
            self._raise_failure()
        committed, self._committed = self._committed, []
        return committed

    @property
    def failed(self) -> bool:
        """Whether the run must stop because a save of this rank failed; `save` and `close` then raise on all ranks."""
        return self._failure is not None and self._config.saving.on_error == "stop"

    def close(self) -> list[Path]:
        """Wait, on every rank, until the save in flight is committed; what `poll` returns.

        Raises CheckpointError when the last save failed: a run does not end without its last checkpoint.
        """
        self._wait()
        self._raise_failure()
        return self.poll()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._peers.leave()
        self._worker.shutdown()  # a save in flight ends, whatever ended the run, unless another rank is gone

    def _wait(self) -> None:
        """Return when the save in flight has ended on every rank. Ranks that wait exchange a sum again and again, so
        that a long commit never meets the time limit of one exchange, and a rank that dies is noticed."""
        if self._context.world == 1:
            self._collect(wait=True)
            return
        while True:
            pending = self._saving is not None and not self._saving.done()
            if not pending:
                self._collect()
            waiting, failures = self._context.sum_integers([int(pending), int(self._failure is not None)])
            if not waiting:
                break
            time.sleep(_POLL_S)
        if failures and self._failure is None:
            self._failure = CheckpointError(
                f"every rank must have written its part of step {self.saved_step}; {failures} of {self._context.world} "
                "failed, and say why in their own messages"
            )

    def _collect(self, *, wait: bool = False) -> None:
        if self._saving is not None and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            try:
                folder = saving.result()
            except CheckpointError as error:
                self._failure = error
            else:
                self._committed += [folder] if folder else []

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _save(self, snapshot: Snapshot, number: int) -> Path | None:
        """In the thread: write, on rank 0 commit, and repeat what failed. The folder on rank 0."""
        write = self._commit if self._context.is_main else self._write_own
        for attempt, pause in enumerate((*PAUSES_S, None), start=1):
            try:
                folder = write(snapshot, f"save {number}.{attempt}")
                break
            except PeerGoneError:
                raise
            except CheckpointError as error:
                self._report(snapshot, error, repeated=pause is not None)
                if pause is None:
                    raise
                self._peers.pause(pause)
        if folder is not None:
            prune(self._run, self._config, self._verified)
        return folder

    def _report(self, snapshot: Snapshot, error: CheckpointError, *, repeated: bool) -> None:
        if self._context.is_main:
            step = snapshot.record["step"]
            follows = "it is tried again" if repeated else f'saving.on_error = "{self._config.saving.on_error}"'
            print(f"warning: the checkpoint of step {step} failed, {follows}: {error}", file=sys.stderr, flush=True)
            with suppress(CheckpointError):  # the journal may be on the same full disk
                self._run.require_place()
                self._run.write_journal("save_failed", step=step, reason=str(error), repeated=repeated)

    def _commit(self, snapshot: Snapshot, key: str) -> Path:
        """Rank 0's part of an attempt: a place to write, every rank's rows, the commit."""

        def gather(folder: Path) -> None:
            self._peers.tell(f"{key} folder", str(folder))
            problems = [self._write_parts(folder, snapshot)]
            problems += [self._peers.hear(f"{key} rank {rank}") for rank in range(1, self._context.world)]
            if any(problems):
                raise CheckpointError("; ".join(filter(None, problems)))

        alone = self._context.world == 1
        try:
            self._run.sync()  # the lines that the checkpoint seals
            failpoint("save.metrics_synced")
            args = (self._run, snapshot, self._config.model, self._shards)
            folder = commit_checkpoint(*args) if alone else commit_checkpoint(*args, gather)
        except BaseException as error:
            if not alone:
                self._peers.tell(f"{key} folder")
                self._peers.tell(f"{key} end", str(error) or type(error).__name__)
            raise
        if not alone:
            self._peers.tell(f"{key} end")
        return folder

    def _write_own(self, snapshot: Snapshot, key: str) -> None:
        """Another rank's part of an attempt."""
        folder = self._peers.hear(f"{key} folder")
        if folder:
            self._peers.tell(f"{key} rank {self._context.rank}", self._write_parts(Path(folder), snapshot))
        problem = self._peers.hear(f"{key} end")
        if problem:
            raise CheckpointError(problem)

    def _write_parts(self, folder: Path, snapshot: Snapshot) -> str:
        """Write this rank's rows; what went wrong, or nothing."""
        rank = self._context.rank
        if not folder.is_dir():
            return (
                f"rank {rank} on {socket.gethostname()} must see the run folder that rank 0 writes to; {folder} is not "
                "there. Put the run on a file system that all machines share"
            )
        try:
            write_parts(folder, rank, snapshot, self._config.model)
        except (OSError, SafetensorError) as error:
            needed = sum(t.nbytes for part in (snapshot.weights, snapshot.optimizer) for t in part.values())
            return f"rank {rank}: {disk_error(folder, error, needed)}"
        failpoint("ranks.part_written")
        return ""

    def _record(self, state: TrainState) -> dict[str, Any]:
        """The plain values of `trainer.json`."""
        config, tokenizer = self._config, self._shards.manifest["tokenizer"]
        return {
            "step": state.step,
            "tokens": config.tokens_at(state.step),
            "stage": config.stages[config.stage_index(state.step)].name,
            "hours": state.hours,
            "faults": state.faults,
            **layout_of(config.parallel, self._context),
            "data_fingerprint": self._shards.fingerprint,
            "tokenizer_hash": tokenizer["hash"],
            "boundary": tokenizer["boundary"],
            "config_digest": config_digest(config),
            "config_digest_version": DIGEST_VERSION,
        }
