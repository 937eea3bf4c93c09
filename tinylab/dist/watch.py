"""What a rank watches from a thread while it works: the process that started it, and the other ranks.

Each rank leaves a beat in the job's store every second: its process, the step it has reached, and the time. Nobody
reads the beats until something is wrong, so they cost a step nothing. A rank that is killed or stopped leaves none.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from tinylab.errors import EXIT_FAILED, LaunchError, RunStopped
from tinylab.runs.durable import process_exists

BEAT_S = 1.0
"""Between two beats, and two looks for the process that started this one."""
LOOK_S = 2.5 * BEAT_S
"""Between two looks at the beats: a rank that has not moved in between is silent."""
OTHERS_GONE = "found another one gone or silent"
"""In the message of a rank that ends only because another one did."""
STORE_S = 5.0
"""How long the store may take to answer the thread."""


class Watch:
    """The thread of one rank. `orphaned` is called in it, once, when the launcher (torchrun) is gone."""

    def __init__(self, rank: int = 0, world: int = 1, orphaned: Callable[[], None] = lambda: None) -> None:
        self.rank, self.world = rank, world
        self.last_words: Callable[[LaunchError], object] = lambda error: None
        """Called in the thread, with the reason, before it ends a process whose main thread hangs."""
        self._orphaned = orphaned
        self._launcher = os.getppid() if is_under_torchrun() else None
        self._store: Store | None = None
        self._store_gone = False
        self._step, self._awaited, self._moved_at = -1, 0, time.monotonic()
        self._patience_s: float | None = None
        self._beats = 0
        self._neighbours: dict[int, dict[str, Any]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.leave()
        blameless = error is None or isinstance(error, RunStopped) or OTHERS_GONE in str(error)
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set(f"end {self.rank}", "" if blameless else str(error) or type(error).__name__)

    def meet(self, store: Store) -> None:
        """From now on leave beats in `store`, through a connection of the thread's own."""
        own = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        own.set_timeout(timedelta(seconds=STORE_S))
        self._store = PrefixStore("watch", own)
        self._beat()

    def await_others(self, done: int) -> None:
        """`done` steps are done, and the main thread now waits for every rank to come to the next one."""
        self._step, self._awaited, self._moved_at = done, done + 1, time.monotonic()

    def reached(self, step: int) -> None:
        """The main thread has done `step`."""
        self._step, self._moved_at = step, time.monotonic()

    def error(self, found: str) -> LaunchError:
        """The error of a rank that ends because of what it found about another one."""
        where = f"after step {self._step}" if self.began else "before the first step"
        return LaunchError(
            f"all {self.world} ranks must live to the end; rank {self.rank} {OTHERS_GONE} {where}: {found}. "
            "Repeat the same command to go on"
        )

    @property
    def began(self) -> bool:
        """Whether the main thread has come to a step."""
        return self._step >= 0

    def expect_steps(self, patience_s: float) -> None:
        """From now on, a main thread that has not moved for `patience_s` is taken to wait for a rank that is silent."""
        self._moved_at, self._patience_s = time.monotonic(), patience_s
        host = socket.gethostname()
        with suppress(RuntimeError):
            self._neighbours = {rank: beat for rank, beat in self._read().items() if beat["host"] == host}

    def leave(self) -> None:
        """The main thread is on its way out: end the thread, which no longer ends the process."""
        self._ended.set()

    def gone(self) -> str | None:
        """Which other rank failed, by its own note, or has no process any more; None where none is known to."""
        for rank in self._others():
            if note := self._note_of(rank):
                return f"rank {rank} failed: {note}"
        try:
            return self._dead(self._read())
        except RuntimeError:
            return "rank 0 is gone, and with it the job's store"

    def trouble(self, silent_s: float = 0.0) -> str | None:
        """As `gone`; or which rank has been silent for `silent_s`, or is behind, and its last step. Takes LOOK_S."""
        try:
            before = self._read()
            if found := self.gone():
                return found
            time.sleep(LOOK_S)
            after = self._read()
        except RuntimeError:
            return self.gone()
        for rank in self._others():
            beat = after.get(rank)
            if self._note_of(rank) == "":
                continue
            if beat is None:
                return f"rank {rank} has given no sign of life"
            age = time.time() - beat["time"]
            if beat["beat"] == before.get(rank, {}).get("beat") and age >= silent_s:
                return f"{_name(beat, rank)} has been silent for {age:.0f} s"
            if beat["awaited"] < self._awaited:
                return f"{_name(beat, rank)} lives but has not come to step {self._awaited}"
        return self.gone()

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def _read(self) -> dict[int, dict[str, Any]]:
        """The last beat of each other rank that left one. Raises RuntimeError when the store is gone, with rank 0."""
        if self._store is None:
            return {}
        if self._store_gone:
            raise RuntimeError("the store is gone")
        there = [rank for rank in self._others() if self._store.check([f"beat {rank}"])]
        return dict(zip(there, map(json.loads, self._store.multi_get([f"beat {r}" for r in there])), strict=True))

    def _dead(self, beats: Mapping[int, dict[str, Any]]) -> str | None:
        """Which rank of this machine has no process any more, although it did not say that it had ended."""
        for rank, beat in beats.items():
            if beat["host"] == socket.gethostname() and not process_exists(beat["pid"]) and self._note_of(rank) != "":
                return f"{_name(beat, rank)} is gone"
        return None

    def _note_of(self, rank: int) -> str | None:
        """Why a rank said it ended, empty if not by its own fault; None as long as it has not said so."""
        with suppress(RuntimeError):
            if self._store is not None and not self._store_gone and self._store.check([f"end {rank}"]):
                return self._store.get(f"end {rank}").decode()
        return None

    def _beat(self) -> None:
        self._beats += 1
        beat = {"beat": self._beats, "step": self._step, "awaited": self._awaited, "time": time.time()}
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        if self._store is not None and not self._store_gone:
            try:
                self._store.set(f"beat {self.rank}", json.dumps(beat | process))
            except RuntimeError:
                self._store_gone = True  # torch warns at each failure

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._launcher = None
                self._orphaned()
            self._beat()
            if (found := self._found()) and not self._ended.wait(2 * BEAT_S):  # the main thread may find it as well
                self._end(found)

    def _found(self) -> str | None:
        """What leaves the main thread waiting for ever: a neighbour is gone, or no step ends and a rank is silent."""
        if self._dead(self._neighbours):
            return self.gone()  # its last beat, which is newer
        if self._patience_s is not None and time.monotonic() - self._moved_at > self._patience_s:
            return self.trouble(self._patience_s)
        return None

    def _end(self, found: str) -> None:
        error = self.error(found)
        print(f"tinylab: {error}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self.last_words(error)
        os._exit(EXIT_FAILED)


def _name(beat: Mapping[str, Any], rank: int) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']}, last seen {'at step ' + str(beat['step']) if beat['step'] >= 0 else 'before its first step'})"


def is_under_torchrun() -> bool:
    """Whether this process is a rank that torchrun, or a supervisor that uses its engine, started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_at() -> float:
    """When this process, or the launcher that started it, began (Unix s); now where the system does not say."""
    try:
        return min(map(_began, [os.getpid(), *([os.getppid()] if is_under_torchrun() else [])]))
    except (OSError, ValueError, IndexError):
        return time.time()


def _began(pid: int) -> float:
    """When a process began (Unix s), from field 22 of /proc/PID/stat: clock ticks since the machine started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age
