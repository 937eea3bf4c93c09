"""Runs training in forked children, so that a hundred kills cost no hundred imports of torch.

Reads one JSON request per line, answers with one JSON line: exit code (negative: killed by that signal), standard
error, seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback

import torch
import torch._dynamo  # the first optimizer would import it in every child

from tinylab.config.io import load_run
from tinylab.errors import TinylabError
from tinylab.runs.folder import Run
from tinylab.train.hooks import Hook
from tinylab.train.loop import train

assert torch


class SignalAt(Hook):
    """Sends this process a signal in the middle of a step's bookkeeping, once."""

    def __init__(self, step: int, number: int) -> None:
        self._step, self._number = step, number

    def step(self, record: dict) -> None:
        if record["step"] == self._step:
            os.kill(os.getpid(), self._number)


def run_child(request: dict, stderr: int) -> int:
    """Train as asked; the exit code."""
    os.setsid()
    os.dup2(stderr, 2)
    os.environ.update(request["env"])
    if request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    hooks = [SignalAt(*request["signal_at"])] if request.get("signal_at") else []
    try:
        train(load_run(request["config"]), Run(request["run"]), hooks=hooks)
        return 0
    except TinylabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 99


def wait(pid: int, request: dict) -> int:
    """The child's exit code, after a signal at its time if one is asked for."""
    number, after = request.get("kill") or (0, 0.0)
    deadline = time.monotonic() + (after if number else 120.0)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, number or signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


for line in sys.stdin:
    request = json.loads(line)
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if not pid:
            os._exit(run_child(request, errors.fileno()))
        code = wait(pid, request)
        errors.seek(0)
        answer = {"code": code, "stderr": errors.read().decode(), "seconds": time.monotonic() - began}
    print(json.dumps(answer), flush=True)
