"""The supervisor over ranks that only end as they are asked to: logs, exit codes, signals, tied lifetime, nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tinylab.dist.rank_logs import RankLogs, last_message
from tinylab.dist.supervisor import cause, exit_code_of
from tinylab.dist.watch import OTHERS_GONE

from .tiny_run import until

RANK = """
import os, signal, sys, time
rank, folder, script = os.environ["RANK"], sys.argv[1], sys.argv[2:]
def stop(number, _):
    print(f"tinylab: rank {rank} stopped by {signal.Signals(number).name}")
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
print(f"rank {rank} of {os.environ['WORLD_SIZE']} begins", file=sys.stderr, flush=True)
with open(f"{folder}/{rank}.new", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}.pid")
if script[:1] == [rank]:
    print(f"tinylab: rank {rank} cannot go on")
    sys.exit(int(script[1]))
while script != ["end"]:
    time.sleep(0.02)
"""


class Forker:
    """Supervisors of one test, over ranks of `RANK`."""

    def __init__(self, driver: subprocess.Popen[str], folder: Path) -> None:
        self._driver, self.folder, self.pids = driver, folder, list[int]()
        (folder / "a_rank.py").write_text(RANK)

    def _ask(self, request: dict) -> int | None:
        assert self._driver.stdin and self._driver.stdout
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        return json.loads(self._driver.stdout.readline())

    def start(self, *options: str, script: tuple[str, ...] = (), ranks: int = 2, fifo: Path | None = None) -> int:
        """A supervisor's process id."""
        argv = ["--nproc-per-node", str(ranks), "--log-dir", str(self.folder / "logs"), *options]
        argv += ["-m", "a_rank", str(self.folder), *script]
        request = {"argv": argv, "env": {"PYTHONPATH": str(self.folder)}, "out": str(self.folder / "out")}
        pid = self._ask({**request, "fifo": fifo and str(fifo)})
        assert pid
        self.pids.append(pid)
        return pid

    def code(self, pid: int) -> int | None:
        """The exit code of a supervisor, as soon as it has ended."""
        code = self._ask({"wait": pid})
        if code is not None:
            self.pids.remove(pid)
        return code

    def said(self) -> str:
        return (self.folder / "out").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()

    def ranks(self, count: int = 2) -> list[int]:
        """The ranks' process ids, as soon as all run."""
        files = [self.folder / f"{rank}.pid" for rank in range(count)]
        until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def driver() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("forker.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture
def forker(driver: subprocess.Popen[str], tmp_path: Path) -> Iterator[Forker]:
    made = Forker(driver, tmp_path)
    yield made
    for pid in made.pids:
        os.kill(pid, signal.SIGKILL)
        made.code(pid)
    for file in tmp_path.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def is_gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


@pytest.mark.parametrize(
    ("number", "passed", "code"),
    [("SIGTERM", "SIGTERM", 143), ("SIGUSR1", "SIGTERM", 143), ("SIGHUP", "SIGTERM", 143), ("SIGINT", "SIGINT", 130)],
)
def test_a_signal_reaches_every_rank_and_gives_its_exit_code(forker: Forker, number: str, passed: str, code: int):
    pid = forker.start()
    ranks = forker.ranks()
    for _ in range(3):  # whoever stops a job may say so more than once
        os.kill(pid, signal.Signals[number])
    assert forker.code(pid) == code
    assert all(is_gone(rank) for rank in ranks)
    assert [f"rank {rank} stopped by {passed}" in forker.log(rank) for rank in (0, 1)] == [True, True]


def test_a_rank_that_fails_gives_its_exit_code_and_message_and_ends_the_others(forker: Forker):
    pid = forker.start(script=("1", "3"))
    assert forker.code(pid) == 3
    assert "tinylab: rank 1 ended with exit code 3: rank 1 cannot go on (log: " in forker.said()
    assert all(is_gone(rank) for rank in forker.ranks())


def test_a_killed_rank_is_named_and_is_a_failure(forker: Forker):
    pid = forker.start()
    os.kill(forker.ranks()[1], signal.SIGKILL)
    assert forker.code(pid) == 1
    assert "tinylab: rank 1 was killed by SIGKILL" in forker.said()


def test_a_tied_supervisor_stops_its_ranks_when_the_other_end_of_its_pipe_is_gone(forker: Forker):
    fifo = forker.folder / "fifo"
    os.mkfifo(fifo)
    pid = forker.start(fifo=fifo)
    parent = os.open(fifo, os.O_WRONLY)
    forker.ranks()
    assert not is_gone(pid)
    os.close(parent)
    assert forker.code(pid) == 143
    assert "the process that launched this run has ended" in forker.said()
    assert "rank 0 stopped by SIGTERM" in forker.log(0)


def test_each_rank_has_one_log_to_which_every_start_appends(forker: Forker):
    for _ in range(2):
        assert forker.code(forker.start(script=("end",))) == 0
    assert sorted(p.name for p in (forker.folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert forker.log(1) == "rank 1 of 2 begins\n" * 2
    assert (forker.folder / "logs" / "rank-0.log").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("make", [lambda path, other: path.symlink_to(other), lambda path, other: os.mkfifo(path)])
def test_a_log_that_is_no_plain_file_is_refused_and_left_alone(
    forker: Forker, make: Callable[[Path, Path], None], tmp_path: Path
):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "logs").mkdir()
    make(tmp_path / "logs" / "rank-1.log", other)
    assert forker.code(forker.start(script=("end",))) == 1
    assert re.search(r"tinylab: \S+/rank-1.log must be", forker.said())
    assert other.read_text() == "mine"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def is_open(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_two_nodes_meet_over_c10d_and_their_ranks_are_counted_together(forker: Forker):
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "x"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    nodes = [forker.start(*meet, ranks=1) for _ in range(2)]
    forker.ranks()
    for pid in nodes:
        os.kill(pid, signal.SIGTERM)
    assert [forker.code(pid) for pid in nodes] == [143, 143]
    assert [forker.log(rank).splitlines()[0] for rank in (0, 1)] == [f"rank {rank} of 2 begins" for rank in (0, 1)]


def test_a_signal_before_the_nodes_have_met_ends_the_supervisor(forker: Forker):
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--local-addr", "127.0.0.1"]
    port = free_port()
    pid = forker.start(*meet, "--rdzv-endpoint", f"127.0.0.1:{port}")
    until(lambda: is_open(port))
    os.kill(pid, signal.SIGTERM)
    assert forker.code(pid) == 143
    assert "stopped before its ranks were started (SIGTERM)" in forker.said()


def test_an_unreachable_rendezvous_is_one_message(forker: Forker):
    # An address of the block that is reserved for documentation: nobody answers.
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-conf", "read_timeout=1"]
    assert forker.code(forker.start(*meet, "--rdzv-endpoint", "192.0.2.1:1")) == 1
    said = forker.said()
    assert "tinylab: all 2 nodes must reach the rendezvous at 192.0.2.1:1; found: " in said
    assert "Traceback" not in said


def test_several_nodes_without_a_place_to_meet_are_refused(forker: Forker):
    assert forker.code(forker.start("--nnodes", "2")) == 1
    assert "several nodes must meet over c10d; found --nnodes 2 without it" in forker.said()


def test_the_cause_is_the_rank_that_others_ended_for(tmp_path: Path):
    logs = RankLogs(tmp_path)
    texts = {0: "tinylab: no such key", 1: f"tinylab: rank 1 {OTHERS_GONE}", 2: "tinylab: stopped (SIGTERM)"}
    for rank, text in texts.items():
        logs.open(rank)
        logs.path(rank).write_text(text)
    assert cause({1: 1, 2: 143, 0: 2}, logs) == (0, 2)
    assert cause({2: 143, 1: 1}, logs) == (2, 143)
    assert cause({1: 1, 2: 143}, logs) == (1, 1)


def test_the_last_message_of_a_log_is_found_among_other_lines():
    assert last_message("step 1\ntinylab: old\nstep 2\ntinylab: new,\non two lines\n") == "new,\non two lines"
    assert last_message("Traceback\nValueError: x\n") == "Traceback\nValueError: x"
    assert last_message("") == ""


def test_exit_codes_of_ranks_that_signals_ended_early():
    assert [exit_code_of(code) for code in (-9, -15, -2, 3, 143)] == [1, 143, 130, 3, 143]
