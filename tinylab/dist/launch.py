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
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinylab.config.io import run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.data.order import check_ranks
from tinylab.dist import slurm
from tinylab.dist.detached import meeting, start_supervisor
from tinylab.dist.gpus import full_gpus, gpus_here
from tinylab.dist.handle import POLL_S, RECORD, SLURM_POLL_S, Handle
from tinylab.dist.rank_logs import last_message
from tinylab.errors import CheckpointError, EXIT_FAILED, EXIT_NOTHING_FOUND, EXIT_USAGE, ConfigError, LaunchError, NothingFoundError
from tinylab.runs.durable import disk_error, write_atomic
from tinylab.runs.folder import Run
from tinylab.runs.regular import open_regular

MODES = ("auto", "process", "torchrun", "slurm")
START_S = 300.0
"""How long `launch` waits for the trainer, nodes wait for one another, and a launch for the end of an earlier one."""
QUEUE_S = 10.0
"""How long `launch` waits for a job that Slurm keeps waiting; then it returns, and the job waits on."""
SETTINGS = "launch.toml"
STANDS = ("running", "done", "stopped")
"""States of a trainer that has begun; one that failed has a message to wait for."""


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
    mode = "torchrun" if mode == "auto" else mode
    if mode == "slurm" and tied:
        raise ConfigError("a tied run must be on this machine; found mode slurm. Use mode torchrun, or leave tied out")
    if nproc is None:
        nproc = 1 if mode == "process" else max(1, _gpus(config, mode))
    if min(nproc, nodes) < 1 or (mode == "process" and nproc * nodes != 1):
        allowed = "1 in mode process" if mode == "process" else "at least 1"
        raise ConfigError(f"nproc and nodes must be {allowed}; found nproc = {nproc}, nodes = {nodes}")
    if mode == "torchrun" and nodes > 1 and not rendezvous:
        raise ConfigError(
            f"{nodes} nodes must meet somewhere; found no rendezvous. Give --rendezvous HOST:PORT, an address of one "
            "of them, and start the same command on each; or use --mode slurm"
        )
    check_ranks(config, nproc * nodes)
    with _one_launch(run, shared=mode == "torchrun" and nodes > 1):
        (run.path / "stop").unlink(missing_ok=True)
        settings = run.path / SETTINGS
        write_atomic(settings, run_to_toml(config))
        record = {"mode": mode, "host": socket.gethostname(), "world": nproc * nodes, "nodes": nodes, "nproc": nproc}
        record |= {"log": str(run.logs_path / "rank-0.log"), "time": time.time()}
        if mode == "slurm":
            record["tied"] = False
            _launch_job(run, config, record, ["--config", str(settings)], timeout)
        else:
            command = ["-m", "tinylab", "train", str(run.path), "--config", str(settings)]
            if mode == "torchrun":
                command = [*meeting(run, nproc, nodes, rendezvous, timeout), *command]
            record["tied"] = bool(os.environ.get("TINYLAB_EXECUTOR")) if tied is None else tied
            _launch_here(run, config, record, command, timeout)
    return Handle(run)


def _gpus(config: RunConfig, mode: str) -> int:
    """GPUs of a node that the run may use."""
    if config.parallel.device == "cpu":
        return 0
    return slurm.gpus_per_node() if mode == "slurm" else gpus_here()


def _launch_here(run: Run, config: RunConfig, record: dict[str, Any], command: list[str], timeout: float) -> None:
    """Start a supervisor on this machine and wait until the trainer stands; asks it to end if it does not."""
    if config.parallel.device != "cpu":
        for sentence in full_gpus():
            print(f"warning: {sentence}", file=sys.stderr)
    in_process = record["mode"] == "process"
    log = run.logs_path / ("rank-0.log" if in_process else f"supervisor-{socket.gethostname()}.log")
    began, before = len(_content(log)), _content(run.status_path)
    process = start_supervisor(command, log, in_process=in_process, tied=record["tied"])
    _keep(run, record | {"pid": process.pid})
    try:
        _until_it_stands(run, before, process.poll, lambda: _content(log)[began:], timeout)
    except BaseException:
        process.terminate()
        raise


def _launch_job(run: Run, config: RunConfig, record: dict[str, Any], options: list[str], timeout: float) -> None:
    """Submit the run's batch file and wait until the trainer stands, or leave the job in the queue."""
    gpus = _gpus(config, "slurm") > 0 or config.parallel.device == "cuda"
    layout = {key: record[key] for key in ("nodes", "nproc")}
    text = slurm.render(run, **layout, gpus=gpus, threads=config.parallel.threads, options=options)
    script, before = slurm.place_script(run, text), _content(run.status_path)
    job = slurm.submit(script)
    _keep(run, record | {"job": job})
    queued_until, asked = time.monotonic() + QUEUE_S, 0.0

    def ended() -> int | None:
        nonlocal asked
        if time.monotonic() - asked < SLURM_POLL_S:
            return None
        state, asked = slurm.job_state(job), time.monotonic()
        if state in slurm.WAITING:
            return 0 if time.monotonic() > queued_until else None
        return None if state in slurm.ACTIVE else 0 if state == "COMPLETED" else EXIT_FAILED

    log = run.logs_path / f"slurm-{job}.log"
    _until_it_stands(run, before, ended, lambda: _content(log), timeout)


def _keep(run: Run, record: dict[str, Any]) -> None:
    """Write down what was started, for whoever attaches."""
    write_atomic(run.path / RECORD, json.dumps(record, indent=1))


@contextmanager
def _one_launch(run: Run, *, shared: bool) -> Iterator[None]:
    """Make the run folder if it is missing and keep other launches away; if `shared`, but for those of the other nodes.

    Raises LaunchError when the run is trained or being launched; waits for the last processes of an earlier start.
    """
    run.require_place_of_its_own()
    try:
        run.logs_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.path.chmod(0o700)
        descriptor = open_regular(run.path / "launch.lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise disk_error(run.path, error) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
        while not shared and handle.is_alive():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the processes of an earlier start of {run.path} must end first; pid {handle.record.get('pid')} "
                    f"still runs after {START_S:g} s. End it, then repeat the same command"
                )
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _until_it_stands(
    run: Run, before: bytes, ended: Callable[[], int | None], said: Callable[[], bytes], timeout: float
) -> None:
    """Return when rank 0 has written a status other than `before`, or `ended` gives 0.

    Raises the trainer's own error, the last message of what was `said`, when it gives another exit code first.
    """
    deadline = time.monotonic() + timeout
    while True:
        code = ended()
        if code == 0 or (code is None and _content(run.status_path) != before and run.status()["state"] in STANDS):
            return
        message = last_message(said().decode(errors="replace"))
        if code is not None:
            kind = {EXIT_USAGE: ConfigError, EXIT_NOTHING_FOUND: NothingFoundError}.get(code, LaunchError)
            raise kind(message or f"the trainer of {run.path} ended with exit code {code} and without a message")
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the trainer of {run.path} must stand within {timeout:g} s; it does not yet. "
                f"Its logs: {run.logs_path}. They end with: {message or 'nothing'}"
            )
        time.sleep(POLL_S)


def _content(path: Path) -> bytes:
    with suppress(OSError, CheckpointError):
        with open(open_regular(path), "rb") as file:
            return file.read()
    return b""
