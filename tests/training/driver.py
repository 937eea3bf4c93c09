"""Runs training in forked children, so that a hundred kills cost no hundred imports of torch.

Reads one JSON request per line, answers with one JSON line: exit code (negative: killed by that signal), standard
error, seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it in every child
import torch.distributed.checkpoint.hf_storage  # as would the first save of several ranks
import torch.distributed.fsdp

import tinylab
from tinylab.checkpoint.checkpointer import Checkpointer
from tinylab.checkpoint.retention import saves_at
from tinylab.checkpoint.state import TrainState
from tinylab.config.io import load_run
from tinylab.errors import TinylabError
from tinylab.model.loss import MicroBatch
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run
from tinylab.training.hooks import Hook
from tinylab.training.loop import train
from tinylab.training.stop import STOP_FILE_S

assert torch


class SignalAt(Hook):
    """Sends this process a signal in the middle of a step's bookkeeping, when every earlier save is committed."""

    def __init__(self, step: int, number: int, run: Run) -> None:
        self._step, self._number, self._run = step, number, run

    def step(self, record: dict) -> None:
        if record["step"] == self._step:
            saved = {step for step in range(1, self._step) if saves_at(self._run.config, step)}
            while not saved <= {line.get("step") for line in self._run.journal() if line["event"] == "committed"}:
                time.sleep(0.001)
            os.kill(os.getpid(), self._number)


class StopFileAt(Hook):
    """Asks the run to stop by its file."""

    def __init__(self, step: int, run: Run) -> None:
        self._step, self._run = step, run

    def step(self, record: dict) -> None:
        if record["step"] == self._step:
            (self._run.path / "stop").touch()
            time.sleep(1.1 * STOP_FILE_S)


def spoil(steps: list[int], what: str, factor: float, rank: int) -> None:
    """Multiply by `factor` what one rank computes in some steps: its `loss`, or the `gradient` alone.

    `what` "signal": send this rank the signal `factor` instead, in the middle of the step.
    """
    resume = Checkpointer.resume

    def resume_spoiled(checkpointer: Checkpointer) -> TrainState:
        state = resume(checkpointer)
        honest = state.loss

        def loss(model: Llama, batch: MicroBatch) -> torch.Tensor:
            value, step = honest(model, batch), state.step + 1
            if step not in steps or int(os.environ.get("RANK", 0)) != rank:
                return value
            if what == "signal":
                os.kill(os.getpid(), int(factor))
            if what == "loss":
                return value * factor
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient * factor)
            return value

        state.loss = loss
        return state

    Checkpointer.resume = resume_spoiled


class Draws(Hook):
    """Draws random numbers after each step, as dropout would: nothing else in a run does."""

    def step(self, record: dict) -> None:
        torch.rand(3)


class Samples(Hook):
    """Asks for text of each checkpoint beside the run; fails for one."""

    def __init__(self, run: Run, fails_at: int) -> None:
        self._run, self._fails_at = run, fails_at

    def checkpoint(self, path: Path) -> Callable[[], object]:
        return lambda: self._write(path)

    def _write(self, path: Path) -> None:
        if int(path.name[5:]) == self._fails_at:
            raise ValueError("no text today")
        text = tinylab.generate(
            tinylab.load_model(path), tinylab.load_tokenizer(path), "", max_new_tokens=40, temperature=1.0, seed=1
        )
        self._run.path.joinpath(f"{path.name}.txt").write_text(text)


def run_child(request: dict, stderr: int) -> int:
    """Train as asked; the exit code."""
    os.setsid()
    os.dup2(stderr, 2)
    faulthandler.dump_traceback_later(60.0, exit=True)  # a hang shows where
    os.environ.update(request["env"])
    if request.get("failpoint_rank") not in (None, int(os.environ.get("RANK", "0"))):
        del os.environ["TINYLAB_FAILPOINT"]
    if request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    run = Run(request["run"])
    if request.get("spoil"):
        spoil(**request["spoil"])
    hooks: list[Hook] = [SignalAt(*request["signal_at"], run)] if request.get("signal_at") else []
    if request.get("draws"):
        hooks.append(Draws())
    if request.get("samples_fail_at"):
        hooks.append(Samples(run, request["samples_fail_at"]))
    if request.get("stop_at"):
        hooks.append(StopFileAt(request["stop_at"], run))
    try:
        train(load_run(request["config"]), run, hooks=hooks)
        return 0
    except TinylabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 99


def start(request: dict, stderr: int) -> list[int]:
    """Fork the ranks of a job; their process ids."""
    ranks = request.get("ranks", 1)
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [{**job, "RANK": str(rank)} for rank in range(ranks)]
    pids = []
    for environment in environments:
        pid = os.fork()
        if not pid:
            os.environ.update(environment)
            os._exit(run_child(request, stderr))
        pids.append(pid)
    return pids


def wait(pids: list[int], request: dict) -> int:
    """The first exit code that is not 0, after a signal to all (or to one rank) at its time if one is asked for."""
    number, after, *one = request.get("kill") or (0, 0.0)
    deadline = time.monotonic() + (after if number else 120.0)
    codes: dict[int, int] = {}
    checkpoints, saves = Path(request["run"], "checkpoints"), set()
    in_save = request.get("kill_in_save")
    while len(codes) < len(pids):
        if in_save and checkpoints.is_dir():
            saves |= {p.name for p in checkpoints.glob(".tmp-step-*")}
            if len(saves) >= in_save[0]:
                number, deadline, in_save = signal.SIGKILL, time.monotonic() + in_save[1], None
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and len(pids) > 1:  # as torchrun does
                    deadline = min(deadline, time.monotonic() + 5.0)
        if time.monotonic() >= deadline:
            for pid in ({pids[rank] for rank in one} or set(pids)) - set(codes):
                os.kill(pid, number or signal.SIGKILL)
            one.clear()
            number, deadline = signal.SIGKILL, time.monotonic() + 60.0
        time.sleep(0.001)
    return next((code for code in codes.values() if code), 0)


for line in sys.stdin:
    request = json.loads(line)
    began = time.monotonic()
    with tempfile.TemporaryFile(buffering=0) as errors:
        code = wait(start(request, errors.fileno()), request)
        errors.seek(0)
        answer = {"code": code, "stderr": errors.read().decode(), "seconds": time.monotonic() - began}
    print(json.dumps(answer), flush=True)
