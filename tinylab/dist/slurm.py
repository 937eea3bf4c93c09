"""Slurm: the batch file of a run, and what is asked of the cluster: submit, state, cancel.

RUN/launch.sbatch is a file of env/slurm with its settings filled in. It belongs to the user: its edits are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tinylab.errors import LaunchError
from tinylab.runs.durable import disk_error, write_atomic
from tinylab.runs.folder import Run, home
from tinylab.runs.regular import read_regular

CPUS_PER_RANK = 4
"""Cores for each GPU process: the trainer, its reading and its hashing."""

SEAL = re.compile(r"^# as tinylab wrote it: (\w+)\n", re.MULTILINE)
"""The line with the digest of all other lines, by which an edited file is known."""
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
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `tinylab launch`. Account, partition, time limit: edit them here.",
        "#",
    ]
    for line in about.splitlines():
        setting = next((s for s in settings if line.startswith(s)), None)
        if setting is None:
            lines.append(line)
        elif (value := settings.pop(setting)) is not None:
            lines.append(setting + value)
    assert not settings, f"the template lacks {settings}"
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}# as tinylab wrote it: {_digest(text)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def place_script(run: Run, text: str) -> Path:
    """Write the batch file `text` into the run folder, unless the user has edited the one that is there; its path.

    Raises LaunchError for an edited file that was made for another command, such as another number of nodes.
    """
    path = run.path / "launch.sbatch"
    try:
        found = read_regular(path).decode(errors="replace") if path.exists() else text
    except OSError as error:
        raise disk_error(path, error) from error
    seals = SEAL.findall(found)
    if seals != [_digest(SEAL.sub("", found))]:
        if seals != SEAL.findall(text):
            raise LaunchError(
                f"{path} must fit this command; it was edited, and made for other nodes, processes or another Python. "
                f"Move it away for a new one, or adapt it and submit it yourself: sbatch {shlex.quote(str(path))}"
            )
        print(f"{path} was edited: submitted as it is", file=sys.stderr)
    else:
        write_atomic(path, text)
    return path


WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ACTIVE = (*WAITING, "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""States of a job that has not ended."""


def submit(script: Path) -> str:
    """Submit the batch file; the job's id. Raises LaunchError with sbatch's own words."""
    remedy = ". Edit that file (account, partition, time limit), then repeat the command"
    return _ask(["sbatch", "--parsable", str(script)], remedy).partition(";")[0].strip()


def job_state(job: str) -> str | None:
    """Slurm's word for the state of a job, such as PENDING, RUNNING or COMPLETED; None if Slurm no longer knows it."""
    try:
        found = re.search(r"\bJobState=(\w+)", _ask(["scontrol", "--oneliner", "show", "job", job]))
    except LaunchError as error:
        if "Invalid job id" not in str(error):
            raise
        return None
    return found[1] if found else None


def is_here() -> bool:
    """Whether jobs can be asked about on this host."""
    return shutil.which("scontrol") is not None


def cancel(job: str) -> None:
    """Cancel a job: one that waits is gone, the ranks of one that runs commit a checkpoint and end."""
    _ask(["scancel", job])


def gpus_per_node() -> int:
    """The most GPUs that a node of this cluster has; 0 where there are none."""
    counts = re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", _ask(["sinfo", "--noheader", "--format=%G"]))
    return max(map(int, counts), default=0)


def _ask(command: list[str], remedy: str = "") -> str:
    """What a Slurm command prints. A job submitted from inside another one does not inherit that one's settings."""
    kept, dropped = ("SLURM_CONF", "SLURM_CLUSTERS"), ("SLURM_", "TINYLAB_EXECUTOR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped) or k in kept}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise LaunchError(
            f"mode slurm needs {command[0]} on the search path; found none. Do this where jobs are submitted, or "
            "choose another mode"
        ) from error
    if done.returncode:
        said = done.stderr.strip()
        raise LaunchError(f"{shlex.join(command)} must succeed; found exit code {done.returncode}: {said}{remedy}")
    return done.stdout
