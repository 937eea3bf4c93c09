"""A log for each rank in RUN/logs, appended to by every start, and the message that it ends with."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinylab.errors import LaunchError
from tinylab.runs.regular import open_regular

MESSAGE = "tinylab: "
"""How a message of the command line begins."""


class RankLogs:
    """Where each rank writes, and where in that file this start began."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began: dict[int, int] = {}

    def path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def open(self, rank: int) -> None:
        """Make the file if it is missing. Raises LaunchError when it cannot be written, and as `open_regular`."""
        path = self.path(rank)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
                self._began[rank] = file.tell()
        except OSError as error:
            raise LaunchError(f"{path} must be a file that rank {rank} can write; found: {error.strerror}") from error

    def written(self, rank: int) -> str:
        """What the rank has written since this start."""
        with suppress(OSError), open(self.path(rank), "rb") as file:
            file.seek(self._began.get(rank, 0))
            return file.read().decode(errors="replace")
        return ""

    def specs(self) -> Any:
        """torchrun's description of this."""
        from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

        logs = self

        class Specs(LogsSpecs):
            def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
                for env in envs.values():
                    logs.open(int(env["RANK"]))
                    env["TINYLAB_LOG"] = str(logs.path(int(env["RANK"])))
                    env["TORCHELASTIC_ERROR_FILE"] = ""
                same = dict.fromkeys(envs, "")
                return LogsDest(same, dict(same), {}, {}, dict.fromkeys(envs, os.devnull))

            @property
            def root_log_dir(self) -> str:
                return str(logs._folder)

        return Specs()  # type: ignore[call-arg]


def last_message(text: str) -> str:
    """The last message of the command line in a log; where there is none, its last lines."""
    _, found, message = f"\n{text}".rpartition(f"\n{MESSAGE}")
    return (message if found else "\n".join(message.splitlines()[-8:])).strip()
