"""Start a run outside of this process, come back to it, stop it. Everything is known from the run folder.

| mode | what is started | survives this process |
|---|---|---|
| `torchrun` (`auto`) | `nproc` ranks on each of `nodes` nodes, under tinylab/dist/supervisor.py | yes |
| `process` | one rank without torchrun, for CPU and debugging | yes |
| `slurm` | a job from a rendered sbatch file (tinylab/dist/slurm.py) | yes |

A `tied` run ends after a checkpoint when the process that launched it has ended, however it did.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tinylab.config.io import run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.data.order import check_ranks
from tinylab.dist import slurm
from tinylab.dist.handle import POLL_S, RECORD, Handle
from tinylab.dist.supervisor import last_message
from tinylab.errors import EXIT_NOTHING_FOUND, EXIT_USAGE, ConfigError, LaunchError, NothingFoundError
from tinylab.runs.durable import disk_error, write_atomic
from tinylab.runs.folder import Run, home

MODES = ("auto", "process", "torchrun", "slurm")
START_S = 300.0
"""How long `launch` waits for the trainer, nodes wait for one another, and a launch for the end of an earlier one."""
OF_A_RANK = re.compile("((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TINYLAB_EXECUTOR)")
"""Variables of a job or notebook around the launch, which its ranks must not take for theirs."""


def launch(
    config: RunConfig | None,
    run: Run | str | Path,
    *,
    mode: str = "auto",
    nproc: int | None = None,
    nodes: int = 1,
    rendezvous: str | None = None,
    tied: bool | None = None,
    timeout: float = START_S,
) -> Handle:
    """Start or resume `run` outside of this process; returns when its trainer stands.

    `config` None: that of the run. `nproc` processes per node; default: its GPUs, else 1. Several `nodes` without
    Slurm: the same call on each, with one `rendezvous` HOST:PORT. `tied` None: only under papermill.
    Raises ConfigError for what cannot be started, LaunchError when the run is trained already, and when the trainer
    ends before it stands: an error with its own text.
    """
    run = run if isinstance(run, Run) else Run(run)
    config = config or run.config
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}; found {mode!r}")
    if mode == "slurm":
        return _submit(config, run, nodes, nproc, tied)
    mode = "torchrun" if mode == "auto" else mode
    nproc = nproc if nproc is not None else 1 if mode == "process" else _devices(config)
    if min(nproc, nodes) < 1 or (mode == "process" and nproc * nodes != 1):
        allowed = "1 in mode process" if mode == "process" else "at least 1"
        raise ConfigError(f"nproc and nodes must be {allowed}; found nproc = {nproc}, nodes = {nodes}")
    if nodes > 1 and not rendezvous:
        raise ConfigError(
            f"{nodes} nodes must meet somewhere; found no rendezvous. Give --rendezvous HOST:PORT, an address of one "
            "of them, and start the same command on each; or use --mode slurm"
        )
    check_ranks(config, nproc * nodes)
    with _one_launch(run, nodes):
        before = _content(run.status_path)
        (run.path / "stop").unlink(missing_ok=True)
        settings = run.path / "launch.toml"
        write_atomic(settings, run_to_toml(config))
        command = ["-m", "tinylab", "train", str(run.path), "--config", str(settings)]
        if mode == "torchrun":
            command = [*_meeting(run, nproc, nodes, rendezvous), *command]
        tied = bool(os.environ.get("TINYLAB_EXECUTOR")) if tied is None else tied
        log = run.logs_path / ("rank-0.log" if mode == "process" else f"supervisor-{socket.gethostname()}.log")
        began = log.stat().st_size if log.exists() else 0
        process = _start(command, log, in_process=mode == "process", tied=tied)
        record = {"mode": mode, "host": socket.gethostname(), "pid": process.pid, "world": nproc * nodes}
        record |= {"nodes": nodes, "nproc": nproc, "tied": tied, "log": str(run.logs_path / "rank-0.log")}
        write_atomic(run.path / RECORD, json.dumps(record | {"time": time.time()}, indent=1))
        try:
            _until_it_stands(run, process, before, lambda: _content(log)[began:].decode(errors="replace"), timeout)
        except BaseException:
            process.terminate()
            raise
    return Handle(run)


def _submit(config: RunConfig, run: Run, nodes: int, nproc: int | None, tied: bool | None) -> Handle:
    """`launch` as a job of Slurm: returns when Slurm has accepted it."""
    if tied:
        raise ConfigError("a tied run must be on this machine; found mode slurm. Use mode torchrun, or leave tied out")
    there = 0 if config.parallel.device == "cpu" else slurm.gpus_per_node()
    gpus = there > 0 or config.parallel.device == "cuda"
    nproc = nproc if nproc is not None else max(1, there)
    if min(nproc, nodes) < 1:
        raise ConfigError(f"nproc and nodes must be at least 1; found nproc = {nproc}, nodes = {nodes}")
    check_ranks(config, nproc * nodes)
    with _one_launch(run, 1):
        settings = run.path / "launch.toml"
        options = ["--config", str(settings)]
        text = slurm.render(run, nodes=nodes, nproc=nproc, gpus=gpus, threads=config.parallel.threads, options=options)
        script = slurm.place_script(run, text)
        write_atomic(settings, run_to_toml(config))
        (run.path / "stop").unlink(missing_ok=True)
        record: dict[str, object] = {"mode": "slurm", "host": socket.gethostname(), "time": time.time()}
        record |= {"job": slurm.submit(script), "world": nproc * nodes, "nodes": nodes, "nproc": nproc, "tied": False}
        record["log"] = str(run.logs_path / "rank-0.log")
        write_atomic(run.path / RECORD, json.dumps(record, indent=1))
    return Handle(run)


def _devices(config: RunConfig) -> int:
    """The GPUs of this machine that the configuration may use, else 1."""
    if config.parallel.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


@contextmanager
def _one_launch(run: Run, nodes: int) -> Iterator[None]:
    """Make the run folder if it is missing and keep other launches away, but for those of the other nodes.

    Raises LaunchError when the run is trained or being launched; waits for the last processes of an earlier start.
    """
    try:
        run.logs_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.path.chmod(0o700)
        descriptor = os.open(run.path / "launch.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise disk_error(run.path, error) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if nodes == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(f"{run.path} is being launched by another command; wait for that one") from None
        status, handle = run.status(), Handle(run)
        if job := handle.job():
            raise LaunchError(
                f"{run.path} must have one trainer at a time; found job {job[0]} of Slurm ({job[1]}). Follow it: "
                f"tinylab attach {run.name}; or stop it: tinylab stop {run.name}"
            )
        if status["state"] == "running":
            raise LaunchError(
                f"{run.path} must have one trainer at a time; found another (pid {status['pid']} on {status['host']}, "
                f"step {status['step']}). Follow it: tinylab attach {run.name}; or stop it: tinylab stop {run.name}"
            )
        deadline = time.monotonic() + START_S
        while nodes == 1 and handle.is_alive():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the processes of an earlier start of {run.path} must end first; pid {handle.record.get('pid')} "
                    f"still runs after {START_S:g} s. End it, then repeat the same command"
                )
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _meeting(run: Run, nproc: int, nodes: int, rendezvous: str | None) -> list[str]:
    """torchrun's options for this number of ranks and nodes."""
    options = ["--nproc-per-node", str(nproc), "--log-dir", str(run.logs_path)]
    if nodes == 1:
        return [*options, "--standalone"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(rendezvous), "--rdzv-id", run.name]
    return [*options, "--nnodes", str(nodes), *meet, "--rdzv-conf", f"join_timeout={START_S:.0f}"]


def _start(command: Sequence[str], log: Path, *, in_process: bool, tied: bool) -> subprocess.Popen[bytes]:
    """A supervisor in a session of its own, which writes to `log`. Nothing of it ends with this process unless tied."""
    environment = {k: v for k, v in os.environ.items() if not OF_A_RANK.fullmatch(k)} | {"TINYLAB_HOME": str(home())}
    options = ["--in-process"] if in_process else []
    kept: tuple[int, ...] = ()
    if tied:
        # The write end is never closed: it ends with this process.
        end, _ = os.pipe()
        options, kept = [*options, "--tied", str(end)], (end,)
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
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


def _until_it_stands(
    run: Run, process: subprocess.Popen[bytes], before: bytes, said: Callable[[], str], timeout: float
) -> None:
    """Return when rank 0 has written a status since `before`. Raises the trainer's own error when it ended first."""
    deadline = time.monotonic() + timeout
    while True:
        code = process.poll()
        if code == 0 or (code is None and _content(run.status_path) != before and run.status()["state"] != "none"):
            return
        if code is not None:
            kind = {EXIT_USAGE: ConfigError, EXIT_NOTHING_FOUND: NothingFoundError}.get(code, LaunchError)
            message = last_message(said())
            raise kind(message or f"the trainer of {run.path} ended with exit code {code} and without a message")
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the trainer of {run.path} must stand within {timeout:g} s; it did not, and was asked to end. Its "
                f"logs: {run.logs_path}. They end with: {last_message(said()) or 'nothing'}"
            )
        time.sleep(POLL_S)


def _content(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""
