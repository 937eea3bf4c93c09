"""Ranks see that their launcher is gone, and name the rank that is gone, silent or behind."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed
from torch.distributed.distributed_c10d import Store

from tinylab.config.io import override, run_to_toml
from tinylab.dist import watch as module
from tinylab.dist.watch import Watch, started_at
from tinylab.runs.durable import process_exists
from tinylab.runs.folder import Run


def wait_until(what: Callable[[], Any], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Job:
    """Two ranks under a real torchrun, whose every process is gone at the end of the test."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.file = log.open("a")
        self.torchrun = subprocess.Popen(command, stdout=self.file, stderr=self.file, start_new_session=True)
        self.ranks: list[int] = []

    def started(self) -> Job:
        def ranks() -> bool:
            self.ranks = children_of(self.torchrun.pid)
            return len(self.ranks) == 2

        wait_until(ranks)
        return self

    def are_gone(self) -> bool:
        return not any(process_exists(pid) for pid in self.ranks)

    def close(self) -> None:
        for pid in self.ranks:
            if process_exists(pid):
                os.kill(pid, signal.SIGKILL)
        self.torchrun.kill()
        self.torchrun.wait()
        self.file.close()


@pytest.fixture
def start(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Job]]:
    """Starts or resumes a run of 240 steps in tmp_path/run by the same command."""
    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    config = override(trainer.config, ["stages.0.tokens=58368", "saving.early=false", "saving.every_tokens=1M"])
    (tmp_path / "config.toml").write_text(run_to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tinylab"]
    jobs: list[Job] = []

    def started() -> Job:
        train = ["train", str(tmp_path / "run"), "--config", str(tmp_path / "config.toml")]
        jobs.append(Job(command + train, tmp_path / "log"))
        return jobs[-1].started()

    yield started
    for job in jobs:
        job.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGUSR1, marks=pytest.mark.stress)])
def test_ranks_whose_torchrun_is_gone_commit_and_end_and_the_same_command_continues(
    number: int, start: Callable[[], Job], reference: Run, tmp_path: Path
):
    run, job = Run(tmp_path / "run"), start()
    wait_until(lambda: run.metrics_path.exists() and len(run.metrics_path.read_bytes().splitlines()) >= 5)
    os.kill(job.torchrun.pid, number)
    wait_until(job.are_gone, 25.0)
    stopped = run.journal()[-1]
    assert stopped["event"] == "stopped" and "its launcher is gone" in stopped["reason"], (tmp_path / "log").read_text()
    assert 5 <= stopped["step"] < 240 and run.checkpoints()[-1].name == f"step-{stopped['step']:08d}"
    assert start().torchrun.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert (resumed["step"], resumed["repeated_steps"]) == (stopped["step"], 0)
    assert [r["step"] for r in run.metric_records()] == list(range(1, 241))


def test_ranks_whose_torchrun_is_killed_while_they_start_end_at_once(
    start: Callable[[], Job], reference: Run, tmp_path: Path
):
    for after in (0.0, 1.5):
        job = start()
        time.sleep(after)
        job.torchrun.kill()
        wait_until(job.are_gone, 60.0)
    run = Run(tmp_path / "run")
    assert not any(line["event"] == "committed" for line in run.journal())
    run.path.mkdir(exist_ok=True)
    with run.lock():
        pass  # nobody holds it


def silenced(rank: int, number: int, step: int, layout: str, trainer: Any, folder: Path) -> tuple[Run, Any]:
    """A run of two ranks, one of which gets a signal in the middle of a step."""
    config = override(trainer.config, [f"parallel.strategy={layout}", "parallel.timeout_s=3"])
    spoil = {"steps": [step], "what": "signal", "factor": number, "rank": rank}
    return Run(folder), trainer.go(folder, config, ranks=2, spoil=spoil)


def assert_named(rank: int, number: int, step: int, ended: Any) -> None:
    """The survivor says which rank, at which step, and what is wrong with it."""
    said = ended.stderr
    assert ended.code != 0 and "Traceback" not in said
    assert f"rank {1 - rank} found another one gone or silent after step {step - 1}: rank {rank}" in said, said
    if number == signal.SIGSTOP:
        found = re.search(rf"rank {rank} \(process \d+ on \S+, last seen (.*)\) has been silent for (\d+) s", said)
        assert found and int(found[2]) >= 2, said
        assert found[1] == "before its first step" or int(found[1].removeprefix("at step ")) < step
    else:
        assert "is gone" in said


@pytest.mark.goal("R3")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=pytest.mark.stress) for s in range(2, 40))])
def test_a_rank_that_is_killed_or_stopped_is_named_with_its_step_and_nothing_is_lost(
    seed: int, trainer: Any, assert_nothing_lost: Any, tmp_path: Path
):
    generator = random.Random(seed)
    layout, rank = generator.choice(["ddp", "fsdp"]), 1 if seed % 4 < 3 else 0
    number = signal.SIGSTOP if seed % 4 == 0 else signal.SIGKILL
    step = generator.randint(3, 23)
    print(f"seed {seed}: {layout}, rank {rank}, {signal.Signals(number).name} in step {step}")
    run, ended = silenced(rank, number, step, layout, trainer, tmp_path / "run")
    assert_named(rank, number, step, ended)
    config = override(trainer.config, [f"parallel.strategy={layout}"])
    assert trainer.go(run.path, config, ranks=2).code == 0
    whole = Run(trainer.folder / f"whole-{layout}")
    if not whole.exists():
        assert trainer.go(whole.path, config, ranks=2).code == 0
    assert_nothing_lost(whole, run)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watch, Watch, Store]]:
    """The watches of two ranks that met in one store, both in this process."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "LOOK_S", 1.0)
    store = distributed.TCPStore("127.0.0.1", 0, 1, True)  # type: ignore[attr-defined]
    with Watch(0, 2) as main, Watch(1, 2) as other:
        main.meet(store)
        other.meet(store)
        yield main, other, store


def test_a_rank_that_lives_and_keeps_pace_is_no_trouble(two: tuple[Watch, Watch, Store]):
    main, other, _ = two
    for watch in (main, other):
        watch.await_others(4)
    time.sleep(0.2)
    assert main.trouble() is None and main.gone() is None


def test_a_rank_that_lives_but_is_behind_is_named_with_its_step(two: tuple[Watch, Watch, Store]):
    main, other, _ = two
    other.await_others(36)
    other.reached(37)
    main.await_others(37)
    time.sleep(0.2)
    assert re.fullmatch(
        r"rank 1 \(process \d+ on \S+, last seen at step 37\) lives but has not come to step 38", main.trouble() or ""
    )


def test_a_rank_without_beats_is_silent_and_one_that_ended_well_is_not(two: tuple[Watch, Watch, Store]):
    main, other, store = two
    other.await_others(37)
    time.sleep(0.2)
    other.leave()
    time.sleep(0.2)
    assert re.match(r"rank 1 \(process \d+ on \S+, last seen at step 37\) has been silent for \d+ s", main.trouble() or "")
    store.set("watch/end 1", "")
    assert main.trouble() is None
    store.set("watch/end 1", "the disk is full")
    assert main.gone() == "rank 1 failed: the disk is full"


def test_a_main_thread_that_hangs_is_ended_with_the_reason_and_its_last_words(
    two: tuple[Watch, Watch, Store], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    """As under NCCL, where the main thread waits inside a library and nothing raises."""
    main, other, _ = two
    exits: list[int] = []
    ended, words = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (exits.append(code), ended.set(), main.leave()))
    main.last_words = words.append
    other.await_others(5)
    main.await_others(5)
    main.expect_steps(1.0)
    time.sleep(2.5)
    assert not exits, "the other rank lives and keeps pace"
    other.leave()
    assert ended.wait(20.0) and exits == [1]
    assert "all 2 ranks must live to the end; rank 0 found another one gone or silent after step 5" in str(words[0])
    assert "tinylab: all 2 ranks" in capfd.readouterr().err


def test_a_process_is_as_old_as_the_system_says():
    code = "from tinylab.dist.watch import started_at; print(started_at())"
    before = time.time()
    found = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert before - 0.5 < found < time.time()
    assert started_at() < before
