"""A supervisor in a session of its own, so that nothing of a run ends with whoever launched it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tinylab.runs.durable import disk_error
from tinylab.runs.folder import Run, home
from tinylab.runs.regular import open_regular

OF_A_RANK = re.compile("((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TINYLAB_EXECUTOR)")
"""Variables of a job or notebook around the launch, which its ranks must not take for theirs."""


def meeting(run: Run, nproc: int, nodes: int, rendezvous: str | None, timeout: float) -> list[str]:
    """torchrun's options for this number of ranks and nodes, which wait for one another `timeout` seconds."""
    options = ["--nproc-per-node", str(nproc), "--log-dir", str(run.logs_path)]
    if nodes == 1:
        return [*options, "--standalone"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(rendezvous), "--rdzv-id", run.name]
    return [*options, "--nnodes", str(nodes), *meet, "--rdzv-conf", f"join_timeout={timeout:.0f}"]


def start_supervisor(command: Sequence[str], log: Path, *, in_process: bool, tied: bool) -> subprocess.Popen[bytes]:
    """A supervisor in a session of its own, which writes to `log`. Nothing of it ends with this process unless tied."""
    environment = {k: v for k, v in os.environ.items() if not OF_A_RANK.fullmatch(k)} | {"TINYLAB_HOME": str(home())}
    options = ["--in-process"] if in_process else []
    kept: tuple[int, ...] = ()
    if tied:
        # The write end is never closed: it ends with this process.
        end, _ = os.pipe()
        options, kept = [*options, "--tied", str(end)], (end,)
    try:
        output = open_regular(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        raise disk_error(log, error) from error
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tinylab.dist.supervisor", *options, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            pass_fds=kept,
            umask=0o077,
        )
    finally:
        for descriptor in (output, *kept):
            os.close(descriptor)
    # As long as this process lives, somebody must take note of the end of that one.
    threading.Thread(target=process.wait, name="supervisor", daemon=True).start()
    return process
