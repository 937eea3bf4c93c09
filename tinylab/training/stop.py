"""A request to stop: a signal, the file RUN/stop, or a launcher that is gone. The loop asks between two steps."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tinylab.dist.watch import started_at
from tinylab.errors import RunStopped
from tinylab.runs.folder import Run

STOP_FILE = "stop"
STOP_FILE_S = 1.0
"""Between two looks for the stop file, by rank 0: a shared file system is slow to ask."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that stop a run; the exit code is 130 after SIGINT, 143 otherwise."""
REASONS = ("", "failed checkpoint", "stop file", "its launcher is gone", *(s.name for s in SIGNALS))
"""Why a run stops, by the number that ranks tell one another."""


class StopRequest:
    """Notes that the run is to stop. Until `defer`, a signal ends at once: nothing is done yet that could be lost."""

    def __init__(self, run: Run) -> None:
        self.reason = 0
        """Number of the reason in REASONS."""
        self._file = run.path / STOP_FILE
        self._looks_for_file = False
        self._looked = -math.inf
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if REASONS[self.reason] == "stop file" and self._looks_for_file:
            self._file.unlink(missing_ok=True)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.note(signal.Signals(number).name)
        if not self._deferred:
            raise self.stopped("before its first step")

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """A signal before the first step ends the run as stopped, even if the library it met raises its own error."""
        try:
            yield
        except Exception as error:
            if not self.reason or self._deferred or isinstance(error, RunStopped):
                raise
            raise self.stopped("before its first step") from error

    def note(self, reason: str) -> None:
        """The run is to stop for a reason of REASONS. Safe in any thread."""
        self.reason = REASONS.index(reason)

    def launcher_gone(self) -> None:
        """Called by another thread: stop after a checkpoint; end at once where nothing was done, however it hangs."""
        self.note("its launcher is gone")
        if not self._deferred:
            error = self.stopped("before its first step")
            print(f"tinylab: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)

    def defer(self, *, looks_for_file: bool = True) -> None:
        """From now on only note signals, and on rank 0 the stop file: the loop stops between two steps."""
        self._deferred, self._looks_for_file = True, looks_for_file

    def forget_old_file(self) -> None:
        """Remove a stop file that was made before this process, or the torchrun that began it, was started."""
        with suppress(FileNotFoundError):
            if self._file.lstat().st_mtime < started_at() + 0.05:  # the kernel's clocks are that coarse
                self._file.unlink()

    def requested(self) -> int:
        """The number of the reason to stop, in REASONS; 0 for none."""
        if not self.reason and self._looks_for_file and time.monotonic() - self._looked >= STOP_FILE_S:
            self._looked = time.monotonic()
            if self._file.exists():
                self.note("stop file")
        return self.reason

    def stopped(self, where: str) -> RunStopped:
        """The exception that ends the run."""
        reason = REASONS[self.reason]
        number = signal.SIGINT if reason == signal.SIGINT.name else signal.SIGTERM
        return RunStopped(f"stopped {where} ({reason}); repeat the same command to go on", int(number))
