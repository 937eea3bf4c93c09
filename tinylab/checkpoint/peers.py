"""What ranks tell one another while a checkpoint is written: short notes in the job's store.

The thread that writes takes part in no collective, so it can neither mix with those of the steps nor time out however
long a disk takes. It waits for notes until this process leaves the run; then only for a moment longer.
"""

from __future__ import annotations

import threading
import time

from tinylab.dist.context import Context
from tinylab.errors import CheckpointError

LEAVING_WAIT_S = 2.0
"""How long a rank that leaves the run still waits for the notes of the others: they may be gone."""
_FIRST_POLL_S, _LAST_POLL_S = 0.002, 0.5


class PeerGoneError(CheckpointError):
    """A checkpoint is not written because another rank, or this one, leaves the run."""


class Peers:
    """The notes of one rank, and of the others."""

    def __init__(self, context: Context) -> None:
        self.rank, self.world = context.rank, context.world
        self._store = context.store
        self._leaving = threading.Event()
        self._left_at = 0.0

    def leave(self) -> None:
        """From now on wait for the others a moment only."""
        self._left_at = time.monotonic()
        self._leaving.set()

    def pause(self, seconds: float) -> None:
        """Wait, but not when this process leaves the run."""
        self._leaving.wait(seconds)

    def tell(self, key: str, text: str = "") -> None:
        """Leave a note. Raises PeerGoneError when the store is gone."""
        assert self._store is not None
        try:
            self._store.set(key, text)
        except RuntimeError as error:
            raise self._gone(key) from error

    def hear(self, key: str) -> str:
        """The note `key`, once it is there. Raises PeerGoneError when this process leaves, or the store is gone."""
        assert self._store is not None
        pause = _FIRST_POLL_S
        try:
            while not self._store.check([key]):
                if self._leaving.is_set() and time.monotonic() > self._left_at + LEAVING_WAIT_S:
                    raise self._gone(key)
                time.sleep(pause)
                pause = min(1.5 * pause, _LAST_POLL_S)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise self._gone(key) from error

    def _gone(self, key: str) -> PeerGoneError:
        return PeerGoneError(
            f"all {self.world} ranks must write a checkpoint together; rank {self.rank} gave up waiting for {key!r}: "
            "another rank has ended. Checkpoints committed before are whole; repeat the same command"
        )
