"""What accompanies a run without changing it: the heartbeat, the progress line, a caller's own hooks.

| hook | does |
|---|---|
| Heartbeat | replaces `status.json`, at most once a second, at least every 20 s |
| Progress | one line on standard error: loss, tokens/s, time left |
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

from tinylab.checkpoint.retention import saves_at
from tinylab.config.schema import RunConfig
from tinylab.errors import CheckpointError
from tinylab.runs.folder import Run
from tinylab.runs.status import STALE_HEARTBEAT_S
from tinylab.training.job import Job

HEARTBEAT_S = 1.0
LONG_WORK_S = 20.0
"""Between signs of life while no step ends: data are prepared, or a step or a checkpoint takes long."""
PREPARING_S = 86_400.0
"""How long data and model may take to prepare before the run counts as hanging."""
FIRST_STEP_S = 1_800.0
"""The same for the first step, in which the model may be compiled."""
SAVING_S = 1_800.0
"""The same for a step that begins a checkpoint and may wait for the one before."""
SLOW_STEPS = 10.0
"""The same for every other step, as a multiple of the slowest so far; at least the silence allowed to a process."""
PLAIN_LINE_S = 10.0
"""Between progress lines where standard error is no terminal."""
BESIDE_WAIT_S = 60.0
"""How long a run that is done waits for work beside it; a run that stops or fails does not wait."""


class Hook:
    """Called by rank 0: start, then step and checkpoint, then end. Override what is needed; the run does not change."""

    def start(self, config: RunConfig, step: int) -> None:
        """Before the first step of this process; `step` steps were done before."""

    def step(self, record: dict[str, Any]) -> None:
        """After a step whose line, `record`, is in `metrics.jsonl`."""

    def checkpoint(self, path: Path) -> Callable[[], object] | None:
        """After the checkpoint at `path` was committed. What is returned is called beside the run, see `Hooks`."""

    def end(self) -> None:
        """After the last step of this process, however it ends."""


class Hooks:
    """The hooks of a run, called one after another, and the work that they ask for beside it.

    That work is done in order, by one thread of low priority. It must not draw from torch's own random generators,
    and its checkpoint may be pruned meanwhile. What it raises is written into the journal and does not end the run.
    """

    def __init__(self, hooks: Sequence[Hook], job: Job, step: int) -> None:
        self._hooks, self._job, self._step = hooks, job, step
        self._asked: queue.SimpleQueue[tuple[str, Path, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False

    def __enter__(self) -> Hooks:
        for hook in self._hooks:
            hook.start(self._job.config, self._step)
        return self

    def step(self, record: dict[str, Any]) -> None:
        """Call the hooks after a step."""
        for hook in self._hooks:
            hook.step(record)

    def checkpoints(self, committed: Sequence[Path]) -> None:
        """Call the hooks for each checkpoint, and put what they return in the queue."""
        for path, hook in product(committed, self._hooks):
            work = hook.checkpoint(path)
            if work is not None:
                self._asked.put((type(hook).__name__, path, work))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="beside", daemon=True)
                    self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(BESIDE_WAIT_S if kind is None else 0.0)
            self._ended = True
            if self._thread.is_alive():
                self._journal("beside_abandoned", waited_s=BESIDE_WAIT_S if kind is None else 0.0)
        for hook in self._hooks:
            hook.end()

    def _work(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux, of this thread alone
        while (asked := self._asked.get()) is not None and not self._ended:
            name, path, work = asked
            try:
                work()
            except Exception as error:
                if not self._ended:
                    reason = f"{type(error).__name__}: {error}"
                    self._journal("beside_failed", hook=name, checkpoint=path.name, reason=reason)

    def _journal(self, event: str, **more: Any) -> None:
        with suppress(CheckpointError):  # a full disk: the run's own writes will say so
            self._job.run.write_journal(event, **more)


class Heartbeat(Hook):
    """Keeps `status.json` fresh: which step the run has reached, when it last made progress, that its process lives.

    Progress is a finished step, or the beginning of work that may take long and says how long; the thread that only
    shows life is none. So a run that hangs is found out although its process lives.
    """

    def __init__(self, run: Run, config: RunConfig, step: int, world: int = 1) -> None:
        self._run, self._config, self._world = run, config, world
        self._written = self._slowest = 0.0
        self._last: dict[str, Any] = {}
        self._warned = False
        self._writing = threading.Lock()
        self.at = step
        self.begin("preparing data and model", PREPARING_S)

    @property
    def tokens(self) -> int:
        """Tokens after the step reached."""
        return self._config.tokens_at(self.at)

    def begin(self, doing: str, allowance_s: float) -> None:
        """Note that work begins which may take `allowance_s` seconds until the next progress."""
        self._progress = {"heartbeat": time.time(), "doing": doing, "allowance_s": round(allowance_s, 3)}

    def start(self, config: RunConfig, step: int) -> None:
        self._slowest = 0.0
        self.begin("the first step", FIRST_STEP_S)

    def step(self, record: dict[str, Any]) -> None:
        first, self.at = self._progress["doing"] == "the first step", record["step"]
        if not first:  # which may have compiled the model
            self._slowest = max(self._slowest, time.time() - self._progress["heartbeat"])
        if saves_at(self._config, self.at):
            self.begin("saving", SAVING_S)
        else:
            self.begin("training", max(STALE_HEARTBEAT_S, SLOW_STEPS * self._slowest))
        now = time.monotonic()
        if now - self._written >= HEARTBEAT_S:
            self._written = now
            self._last = {k: record[k] for k in ("loss", "stage", "tokens_per_s")}
            self.show_running()

    def show_running(self) -> None:
        """Replace the status, or warn once that it cannot be written: views lack it then, the run does not."""
        try:
            self.write("running", **self._last)
        except CheckpointError as error:
            if not self._warned:
                print(f"warning: {error}. Training continues", file=sys.stderr, flush=True)
            self._warned = True

    def write(self, state: str, **more: Any) -> None:
        """Replace the status now. Raises CheckpointError when the run folder is gone."""
        plan = {"steps": self._config.steps, "tokens": self.tokens, "world": self._world}
        with self._writing:
            self._run.require_place()
            self._run.write_status(state, self.at, **plan, **self._progress, **more)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show from a thread that the process lives: a run that is silent for two minutes counts as lost."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(LONG_WORK_S):
                with suppress(CheckpointError):  # the loop's own write will say so
                    self.write("running", **self._last)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Progress(Hook):
    """The progress line: a bar in a terminal, else a plain line each ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._printed = 0.0

    def start(self, config: RunConfig, step: int) -> None:
        self._config, self._first, self._began = config, step, time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True)

    def step(self, record: dict[str, Any]) -> None:
        with suppress(OSError):  # a terminal or pipe that went away must not end the run
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {_loss_of(record)}, {record['tokens_per_s']:,.0f} tokens/s", False)
            self._bar.update()
            return
        now = time.monotonic()
        last = record["step"] == self._config.steps
        if self._printed == 0.0 or last or now - self._printed >= PLAIN_LINE_S:
            self._printed = now
            per_step = (now - self._began) / (record["step"] - self._first)
            left = round((self._config.steps - record["step"]) * per_step)
            print(
                f"step {record['step']}/{self._config.steps}  {record['tokens']:,} tokens  loss {_loss_of(record)}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
                file=sys.stderr,
                flush=True,
            )

    def end(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


def _loss_of(record: dict[str, Any]) -> str:
    return "n/a" if record["loss"] is None else f"{record['loss']:.3f}"


def progress_hooks(wanted: bool) -> list[Hook]:
    """The progress line, unless it is unwanted or an executor (papermill) collects the output: TINYLAB_EXECUTOR."""
    return [Progress()] if wanted and not os.environ.get("TINYLAB_EXECUTOR") else []
