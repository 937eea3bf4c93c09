"""What a user can mend: one base class and a few kinds, each with its exit code.

A message has three parts: what must hold, what was found (file or key in full), what to do.
Anything else that escapes is a defect of tinylab and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOTHING_FOUND = 3


class TinylabError(Exception):
    """Base of every error that a user can mend; the command line and a notebook's cell print its message alone."""

    exit_code = EXIT_FAILED

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what a cell shows in place of a traceback."""
        return [str(self)]


class ConfigError(TinylabError):
    """A configuration, argument or notebook parameter that cannot be used as given."""

    exit_code = EXIT_USAGE


class DataError(TinylabError):
    """A corpus, tokenizer or token shard that is missing, empty, damaged or does not fit."""


class CheckpointError(TinylabError):
    """A checkpoint or run folder that is damaged, locked or cannot be written."""


class LaunchError(TinylabError):
    """A training job that cannot be started, followed or stopped."""


class EvaluationError(TinylabError):
    """An evaluation that cannot be run, or results that must not be compared."""


class NotebookError(TinylabError):
    """A notebook whose cell raised, whose kernel died, or that ran out of time."""


class NothingFoundError(TinylabError):
    """Nothing usable where something was asked for: no checkpoint, no run, an empty store."""

    exit_code = EXIT_NOTHING_FOUND


class RunStopped(TinylabError):
    """Training ended by a signal, after a committed checkpoint. Exit code 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(name: object, known: Iterable[object], otherwise: str = "") -> str:
    """`did you mean …?` with the known name nearest to `name`; `otherwise` where none is near."""
    import difflib

    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"did you mean {near[0]}?" if near else otherwise
