"""A launched run, known from its folder alone: is it alive, its logs, its metrics as they come, its end, a stop."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.dist import slurm
from tinylab.errors import EXIT_FAILED, EXIT_NOTHING_FOUND, CheckpointError, LaunchError, NothingFoundError
from tinylab.runs.durable import disk_error, process_exists
from tinylab.runs.folder import Run
from tinylab.runs.following import MetricsReader
from tinylab.runs.regular import open_regular, read_json

POLL_S = 0.2
"""How often a waiting caller looks at the run folder."""
SLURM_POLL_S = 2.0
"""How often it asks Slurm."""
TAIL_BYTES = 2**20
"""Of the end of a log, read for its last lines."""
STOP_S = 120.0
"""How long `stop` waits for the checkpoint."""
RECORD = "launch.json"
EXIT_CODES = {"done": 0, "stopped": 143, "none": EXIT_NOTHING_FOUND}
"""A run's own exit code by its state; any other: 1."""
Each = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Handle:
    """A launched run, or one that somebody else started; made from its folder alone."""

    run: Run

    @property
    def record(self) -> dict[str, Any]:
        """What `launch` wrote down: mode, host, pid or job, world, nodes, nproc, log, time; empty if it did not."""
        try:
            record = read_json(self.run.path / RECORD)
        except (CheckpointError, OSError):
            return {}
        return record if isinstance(record, dict) else {}

    def state(self) -> str:
        """State of the run (`running`, `stopped`, …) by its status."""
        return str(self.run.status()["state"])

    def is_alive(self) -> bool:
        """Whether it trains, or what was launched for it still runs on this host or is a job that has not ended."""
        return self.state() == "running" or _is_supervised(self.record) or self.job() is not None

    def job(self) -> tuple[str, str] | None:
        """The Slurm job that was launched for the run and its state, until it has ended. None on hosts without Slurm;
        UNKNOWN while Slurm does not answer."""
        job = self.record.get("job")
        if job is None or not slurm.is_here():
            return None
        try:
            state = slurm.job_state(str(job))
        except LaunchError:
            state = "UNKNOWN"
        return (str(job), state) if state in (*slurm.ACTIVE, "UNKNOWN") else None

    def exit_code(self) -> int:
        """The run's own exit code by its state: 0 done, 143 stopped, 1 failed or lost, 3 never started.

        1 too for a job that ended before its trainer wrote anything: the state is then an older one.
        """
        status, record = self.run.status(), self.record
        if "job" in record and status["state"] != "none" and status.get("heartbeat", 0) < record.get("time", 0):
            return EXIT_FAILED
        return EXIT_CODES.get(self.state(), EXIT_FAILED)

    def tail(self, rank: int = 0, lines: int = 20) -> str:
        """The last lines of a rank's log. Raises NothingFoundError when the rank has none."""
        path = self.run.logs_path / f"rank-{rank}.log"
        if "job" in self.record and not path.exists():  # the job's own log says why no rank was started
            path = self.run.logs_path / f"slurm-{self.record['job']}.log"
        try:
            with open(open_regular(path), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            have = ", ".join(sorted(p.stem for p in self.run.logs_path.glob("rank-*.log"))) or "none"
            raise NothingFoundError(f"{path} must be the log of rank {rank}; found logs of: {have}") from error
        return "\n".join(text.splitlines()[-lines:])

    def attach(self, each: Each | None = None, timeout: float | None = None) -> int:
        """Follow the run to its end: `each` gets every line of its metrics, once per step, from the first step on.

        Returns the run's exit code. Raises LaunchError when its folder vanishes, or after `timeout` seconds; the run
        is left alone then.
        """
        reader, last, began = MetricsReader(self.run.metrics_path), 0, time.monotonic()
        while True:
            alive = self.is_alive()  # before reading: what was written until the end is then read
            if not self.run.path.is_dir():
                raise LaunchError(f"{self.run.path} must stay where it is while its run is followed; it is gone")
            for record in reader.read():
                if record["step"] > last:
                    last = record["step"]
                    if each is not None:
                        each(record)
            if not alive:
                return self.exit_code()
            if timeout is not None and time.monotonic() - began > timeout:
                raise LaunchError(f"{self.run.path} must end within {timeout:g} s; it still trains, at step {last}")
            self._pause()

    def wait(self, timeout: float | None = None) -> int:
        """`attach` without looking at the metrics."""
        return self.attach(timeout=timeout)

    def stop(self, timeout: float = STOP_S) -> str:
        """Ask the run, through its folder, to stop, and wait until it has; its state then.

        A run that does not train is left as it is. Raises LaunchError when it still trains after `timeout` seconds:
        the request stands.
        """
        if not self.is_alive():
            return self.state()
        request = self.run.path / "stop"
        try:
            request.touch(mode=0o600)
        except OSError as error:
            raise disk_error(request, error) from error
        deadline = time.monotonic() + timeout
        while self.is_alive():
            if time.monotonic() > deadline:
                status = self.run.status()
                raise LaunchError(
                    f"{self.run.path} must stop within {timeout:g} s; it still trains: pid {status.get('pid')} on "
                    f"{status.get('host')}, step {status.get('step')}. The request stands; look at tinylab runs and at "
                    f"{self.run.logs_path}"
                )
            if self.state() != "running" and (job := self.job()) and job[1] in slurm.WAITING:
                slurm.cancel(job[0])
            self._pause()
        request.unlink(missing_ok=True)  # nobody is left who would obey it
        return self.state()

    def _pause(self) -> None:
        """Wait before the run is looked at again. Slurm is asked while no rank trains, and must not be asked often."""
        time.sleep(SLURM_POLL_S if "job" in self.record and self.state() != "running" else POLL_S)


def attach(run: Run | str | Path) -> Handle:
    """The handle of a run that was started before, by anybody. Raises NothingFoundError when there is none."""
    run = run if isinstance(run, Run) else Run(run)
    if not run.exists() and not (run.path / RECORD).exists():
        run.require()
    return Handle(run)


def _is_supervised(record: dict[str, Any]) -> bool:
    """Whether what was launched runs on this host; False where that cannot be known."""
    pid = record.get("pid")
    if not isinstance(pid, int) or record.get("host") != socket.gethostname() or not process_exists(pid):
        return False
    with suppress(OSError):  # where the system shows it: the number may belong to another process by now
        return b"tinylab" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return True
