"""Rank, world and device as one object; checks between ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from tinylab.config.schema import Parallel
from tinylab.dist.context import Context, open_context
from tinylab.errors import LaunchError

CPU = Parallel(device="cpu", threads=1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_a_process_is_alone_and_needs_no_group():
    with open_context(CPU) as context:
        assert (context.rank, context.world, context.is_main, context.device.type) == (0, 1, True, "cpu")
        assert context.sum_integers([2**63 - 1, 5]) == [2**63 - 1, 5]
        assert not torch.distributed.is_initialized()


def test_threads_are_those_of_the_configuration_or_the_cores():
    before = torch.get_num_threads()
    try:
        with open_context(CPU) as context:
            assert context.threads == torch.get_num_threads() == 1
        with open_context(Parallel(device="cpu")) as context:
            assert context.threads == torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_missing_device_and_a_bad_rank_are_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(LaunchError, match='"cuda" needs a working CUDA device; found none'),
        open_context(Parallel(device="cuda")),
    ):
        pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(LaunchError, match="RANK must be a whole number; found 'first'"), open_context(CPU):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LaunchError, match="RANK must lie below WORLD_SIZE; found RANK 1 and WORLD_SIZE 1"):
        open_context(CPU).__enter__()


RANKS = """
import sys
from tinylab.config.schema import Parallel
from tinylab.dist.context import open_context
from tinylab.errors import LaunchError
with open_context(Parallel(device="cpu", threads=1)) as context:
    total = context.sum_integers([context.rank + 1, 2**62 - context.rank])
    assert total == [3, 2**63 - 1], total
    parts = context.gather_tensor(__import__("torch").tensor([context.rank]))
    assert [p.item() for p in parts] == [0, 1]
    context.require_equal("ab" * 32, "the weights")
    try:
        context.require_equal(("ab" if context.rank else "cd") * 32, "the weights")
    except LaunchError as error:
        print(error)
"""


def outputs_of_two_ranks(code: str) -> list[str]:
    """Standard output of both ranks of a job that runs `code` and ends well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | job | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    return outputs


def test_two_ranks_sum_exactly_and_notice_weights_that_differ():
    """TinyLlama's ranks could start from different weights (issue 180 of its repository): nobody compared them."""
    for output in outputs_of_two_ranks(RANKS):
        assert "the weights must be equal on all 2 ranks before the first step; rank 1 differs from rank 0" in output


WAITING = """
import time
from tinylab.config.schema import Parallel
from tinylab.dist import context as module
from tinylab.errors import DataError, LaunchError

def work(result, seconds=0.0):
    done.append(result)
    time.sleep(seconds)
    if isinstance(result, Exception):
        raise result
    return result

module.START_S, done = 1.0, []
with module.open_context(Parallel(device="cpu", threads=1)) as context:
    began = time.monotonic()
    found = context.after_main(lambda: work("prepared", 2.5), lambda: work("opened"), "the data")
    print(found, done, time.monotonic() - began > 2.4)
    try:
        context.after_main(lambda: work(DataError("no text")), lambda: work("never"), "other data")
    except (DataError, LaunchError) as error:
        print(type(error).__name__, error, done[1:])
"""


def test_other_ranks_wait_for_rank_0_beyond_the_timeout_and_learn_of_its_failure():
    main, other = outputs_of_two_ranks(WAITING)
    assert main.splitlines() == ["prepared ['prepared'] True", "DataError no text [DataError('no text')]"]
    message = "LaunchError rank 0 must have other data ready before the other ranks begin; it failed: no text []"
    assert other.splitlines() == ["opened ['opened'] True", message]


def test_one_rank_agrees_with_itself():
    Context(device=torch.device("cpu")).require_equal("00", "the weights")
