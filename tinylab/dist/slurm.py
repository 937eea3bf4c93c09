"""Slurm: the batch file of a run, and what is asked of the cluster: submit, state, cancel.

RUN/launch.sbatch is a file of env/slurm with its settings filled in.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tinylab.errors import LaunchError
from tinylab.runs.folder import Run, home

CPUS_PER_RANK = 4
"""Cores for each GPU process: the trainer, its reading and its hashing."""

TEMPLATES = Path(__file__).parent
"""single-node.sbatch and multi-node.sbatch, the files in env/slurm."""


def render(
    run: Run,
    *,
    nodes: int = 1,
    nproc: int = 8,
    gpus: bool = True,
    threads: int | None = None,
    options: Sequence[str] = (),
) -> str:
    """The batch file that trains `run` with `options` of `tinylab train` on `nodes` × `nproc` processes.

    A template with its settings filled in. Without `gpus` it asks for `threads` cores (default 1) for each process.
    """
    text = (TEMPLATES / ("single-node.sbatch" if nodes == 1 else "multi-node.sbatch")).read_text(encoding="utf-8")
    _, _, about = text.partition("\n#\n")
    cpus = nproc * (CPUS_PER_RANK if gpus else threads or 1)
    output = str(run.logs_path).replace("%", "%%") + "/slurm-%j.log"
    settings: dict[str, str | None] = {
        "#SBATCH --job-name=": shlex.quote(f"tinylab-{run.name}"),
        "#SBATCH --nodes=": str(nodes),
        "#SBATCH --gpus-per-node=": str(nproc) if gpus else None,
        "#SBATCH --cpus-per-task=": str(cpus),
        "#SBATCH --output=": shlex.quote(output),
        "run=": shlex.quote(str(run.path)),
        "options=": f"({shlex.join(options)})",
        "nproc=": str(nproc),
        "python=": shlex.quote(sys.executable),
        "export TINYLAB_HOME=": shlex.quote(str(home())),
    }
    lines = ["#!/usr/bin/env bash", "# Written by `tinylab launch`. Account, partition, time limit: edit them here.", "#"]
    for line in about.splitlines():
        setting = next((s for s in settings if line.startswith(s)), None)
        if setting is None:
            lines.append(line)
        elif (value := settings.pop(setting)) is not None:
            lines.append(setting + value)
    assert not settings, f"the template lacks {settings}"
    return "\n".join(lines) + "\n"


def script_path(run: Run) -> Path:
    """Where a run's batch file is."""
    return run.path / "launch.sbatch"


def submit(script: Path) -> str:
    """Submit the batch file; the job's id. Raises LaunchError with sbatch's own words."""
    return _ask(["sbatch", "--parsable", str(script)]).partition(";")[0].strip()


def job_state(job: str) -> str | None:
    """Slurm's word for the state of a job, such as PENDING, RUNNING or COMPLETED; None if Slurm no longer knows it."""
    try:
        found = re.search(r"\bJobState=(\w+)", _ask(["scontrol", "--oneliner", "show", "job", job]))
    except LaunchError as error:
        if "Invalid job id" not in str(error):
            raise
        return None
    return found[1] if found else None


def cancel(job: str) -> None:
    """Cancel a job: one that waits is gone, the ranks of one that runs commit a checkpoint and end."""
    _ask(["scancel", job])


def gpus_per_node() -> int:
    """The most GPUs that a node of this cluster has; 0 where there are none."""
    counts = re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", _ask(["sinfo", "--noheader", "--format=%G"]))
    return max(map(int, counts), default=0)


def _ask(command: list[str]) -> str:
    """What a Slurm command prints. A job submitted from inside another one does not inherit that one's settings."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise LaunchError(
            f"Slurm's {command[0]} must be on the search path for --mode slurm; found none. "
            "Run this where jobs are submitted, or choose another mode"
        ) from error
    if done.returncode:
        raise LaunchError(
            f"{shlex.join(command)} must succeed; it ended with exit code {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout
