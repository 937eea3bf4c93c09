"""A real Slurm for the tests marked `slurm`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from ..training.conftest import assert_nothing_lost, reference, tiny_config, trainer
from . import slurm_cluster

__all__ = ["assert_nothing_lost", "reference", "tiny_config", "trainer"]


class Cluster:
    """A Slurm of two nodes, asked as a user would."""

    def __init__(self, folder: Path, keeper: IO[str]) -> None:
        self.folder, self._keeper = folder, keeper
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *command: str | Path, **variables: str) -> str:
        """What a command of Slurm prints."""
        environment = self.environment | variables
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str, field: str) -> str:
        """A field of a job, such as JobState."""
        found = re.search(rf"\b{field}=(\S*)", self.ask("scontrol", "--oneliner", "show", "job", job))
        return found[1] if found else ""

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        """Return once `condition()` holds; fail with the logs of the folder's jobs if it never does."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in sorted(Path.cwd().rglob("*.log")))
                pytest.fail(f"{what} within {seconds:.0f} s; squeue: {self.ask('squeue')}\n{logs}")
            time.sleep(0.1)

    def ranks(self, count: int) -> list[int]:
        """The process ids of the `count` ranks that train in jobs."""
        self.wait(lambda: len(slurm_cluster.members(self.folder, "RANK=")) == count, f"{count} ranks must run")
        return slurm_cluster.members(self.folder, "RANK=")

    def kill_node(self, name: str) -> None:
        """Kill what belongs to a node: slurmd, its job steps and the processes in them."""
        (daemon,) = (p for p in slurm_cluster.members(self.folder) if _arguments(p)[:4] == ["slurmd", "-D", "-N", name])
        tasks = slurm_cluster.members(self.folder, f"SLURMD_NODENAME={name}")
        steps = {parent for parent in map(_parent, tasks) if _arguments(parent)[0].startswith("slurmstepd")}
        for pid in (daemon, *steps, *tasks):
            os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd again."""
        self._keeper.write(f"{name}\n")
        self._keeper.flush()

    def ended(self, job: str, seconds: float = 120.0) -> str:
        """The state of a job, and its exit code, when it has ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.wait(lambda: self.job(job, "JobState") not in going, f"job {job} must end", seconds)
        return f"{self.job(job, 'JobState')} {self.job(job, 'ExitCode')}"


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes on this machine, taken down with all its processes however the tests end."""
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} found (apt-get install slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("only root can start a Slurm")
    folder = tmp_path_factory.mktemp("slurm")
    command = [sys.executable, slurm_cluster.__file__, str(folder)]
    keeper = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert keeper.stdin and keeper.stdout
    said = keeper.stdout.readline()
    assert said == "ready\n", said + keeper.stdout.read()
    yield Cluster(folder, keeper.stdin)
    keeper.stdin.close()
    assert keeper.wait(timeout=60) == 0, keeper.stdout.read()
    keeper.stdout.close()
    assert slurm_cluster.members(folder) == []
