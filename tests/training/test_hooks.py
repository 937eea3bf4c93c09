"""What accompanies a run: heartbeat, progress line, stop requests."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tinylab
from tinylab.config.schema import RunConfig
from tinylab.errors import DataError, RunStopped
from tinylab.runs.folder import Run
from tinylab.training import hooks, loop, opening
from tinylab.training.hooks import Heartbeat, Hook, Hooks, Progress, progress_hooks
from tinylab.training.stop import StopRequest


def record(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 256 * step, "loss": 3.25, "stage": "basic", "tokens_per_s": 1234.5}


def test_the_heartbeat_is_written_at_most_once_a_second(tiny_config: RunConfig, tmp_path: Path, monkeypatch: Any):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    heartbeat = Heartbeat(Run(tmp_path), tiny_config, 0)
    written = []
    for step in range(1, 11):
        heartbeat.step(record(step))
        written.append(Run(tmp_path).status()["step"])
        clock[0] += 0.4
    assert written == [1, 1, 1, 4, 4, 4, 7, 7, 7, 10]
    status = Run(tmp_path).status()
    assert (status["state"], status["steps"], status["tokens"], status["loss"]) == ("running", 24, 2560, 3.25)


def test_life_is_shown_while_no_step_ends_and_is_no_progress(tiny_config: RunConfig, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(hooks, "LONG_WORK_S", 0.01)
    run = Run(tmp_path)
    heartbeat = Heartbeat(run, tiny_config, 0)
    with heartbeat.beating():
        heartbeat.step(record(5))
        first = run.status()
        deadline = time.monotonic() + 10
        while run.status()["alive"] == first["alive"] and time.monotonic() < deadline:
            time.sleep(0.01)
    last = run.status()
    assert last["alive"] > first["alive"] and last["heartbeat"] == first["heartbeat"]
    assert (last["state"], last["step"], last["loss"]) == ("running", 5, 3.25)
    heartbeat.write("stopped")
    time.sleep(0.05)
    assert run.status()["state"] == "stopped", "nothing is written after the end"


def test_a_run_that_hangs_is_lost_although_its_process_lives(tiny_config: RunConfig, tmp_path: Path, monkeypatch: Any):
    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    run, heartbeat = Run(tmp_path), Heartbeat(Run(tmp_path), tiny_config, 0, 2)

    def state_after(seconds: float) -> str:
        clock[0] += seconds
        heartbeat.write("running")  # the thread is alive
        return run.status()["state"]

    assert state_after(80_000) == "running", "data may take a day"
    heartbeat.start(tiny_config, 0)
    assert state_after(1_700) == "running", "the first step may compile"
    heartbeat.step(record(6))
    assert state_after(100) == "running"
    heartbeat.step(record(7))
    assert state_after(900) == "running", "a step took 100 s"
    assert state_after(200) == "lost"
    status = run.status()
    assert status["reason"].startswith("no progress for 1100 s (training, after step 7); process ")
    assert status["reason"].endswith("still runs") and status["world"] == 2
    heartbeat.step(record(10))
    assert state_after(1_700) == "running", "step 10 begins a checkpoint"
    assert state_after(200) == "lost" and "(saving, after step 10)" in run.status()["reason"]


def test_without_a_terminal_a_plain_line_comes_each_ten_seconds(
    tiny_config: RunConfig, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
):
    clock = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress()
    progress.start(tiny_config, 0)
    for step in range(1, 25):
        clock[0] += 3.0
        progress.step(record(step))
    progress.end()
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 5, 9, 13, 17, 21, 24]
    assert lines[0] == "step 1/24  256 tokens  loss 3.250  1,234 tokens/s  0:01:09 left"
    assert lines[-1].endswith("0:00:00 left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_a_bar_shows_loss_and_rate(tiny_config: RunConfig, monkeypatch: Any):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    progress.start(tiny_config, 4)
    progress.step(record(5))
    progress.end()
    assert "5/24" in terminal.getvalue() and "loss 3.250, 1,234 tokens/s" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reader_that_left_does_not_end_the_run(terminal: bool, tiny_config: RunConfig, monkeypatch: Any):
    class Stream(io.StringIO):
        left = False

        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if self.left:
                raise BrokenPipeError
            return super().write(text)

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(hooks, "PLAIN_LINE_S", 0.0)
    progress = Progress()
    progress.start(tiny_config, 0)
    progress.step(record(1))
    stream.left = True
    for step in range(2, 25):
        progress.step(record(step))
        time.sleep(0.01)
    progress.end()
    assert "/24" in stream.getvalue()


def test_an_executor_gets_no_progress_line(monkeypatch: Any):
    assert len(progress_hooks(True)) == 1 and progress_hooks(False) == []
    monkeypatch.setenv("TINYLAB_EXECUTOR", "papermill")
    assert progress_hooks(True) == []


def test_a_signal_before_the_first_step_ends_at_once_and_later_only_leaves_a_note(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(Run(tmp_path)) as stop:
        with pytest.raises(RunStopped, match="before its first step") as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert stopped.value.exit_code == 143
    with StopRequest(Run(tmp_path)) as stop:
        stop.defer()
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() and stop.stopped("now").exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_file_is_obeyed_and_removed(tmp_path: Path):
    with StopRequest(Run(tmp_path)) as stop:
        stop.defer()
        (tmp_path / "stop").touch()
        assert stop.requested() and stop.stopped("now").exit_code == 143
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("progress", [True, False])
def test_the_preparation_of_data_speaks_only_where_progress_is_wanted(
    progress: bool, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A notebook shows its own view, and every line on standard error as an alarm."""
    given = []

    def prepare(data: Any, *, progress: Any) -> None:
        given.append(progress)
        raise DataError("enough")

    monkeypatch.setattr(opening, "prepare", prepare)
    with pytest.raises(DataError, match="enough"):
        loop.train(tiny_config, Run(tmp_path / "run"), progress=progress)
    assert given == [None] if progress else given[0]("a line") is None


def test_work_beside_the_run_changes_no_bit_of_it_and_its_failure_is_journaled(
    trainer: Any, reference: Run, assert_nothing_lost: Any, tmp_path: Path
):
    run = Run(tmp_path / "run")
    ended = trainer.go(run.path, samples_fail_at=10)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(reference, run)
    failed = [line for line in run.journal() if line["event"] == "beside_failed"]
    assert [(x["hook"], x["checkpoint"], x["reason"]) for x in failed] == [
        ("Samples", "step-00000010", "ValueError: no text today")
    ]
    texts = {p.stem: p.read_text() for p in run.path.glob("step-*.txt")}
    assert set(texts) == {p.name for p in reference.checkpoints()} - {"step-00000010"}
    last = tinylab.load_model(reference.checkpoints()[-1]), tinylab.load_tokenizer(reference.checkpoints()[-1])
    assert texts["step-00000024"] == tinylab.generate(*last, "", max_new_tokens=40, temperature=1.0, seed=1)


class Slow(Hook):
    """Asks for work that lasts until `free` is set."""

    def __init__(self) -> None:
        self.free, self.done, self.ended = threading.Event(), threading.Event(), False

    def checkpoint(self, path: Path) -> Any:
        return self.work

    def work(self) -> None:
        self.free.wait(20)
        self.done.set()

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def job(tiny_config: RunConfig, tmp_path: Path) -> Any:
    run = Run(tmp_path / "run")
    run.create(tiny_config, {})
    return SimpleNamespace(config=tiny_config, run=run)


def test_a_run_that_is_done_waits_for_the_work_beside_it(job: Any):
    slow = Slow()
    with Hooks([slow], job, 0) as told:
        told.checkpoints([Path("step-00000001")])
        threading.Timer(0.2, slow.free.set).start()
    assert slow.done.is_set() and slow.ended and job.run.journal() == []


def test_a_run_that_is_done_abandons_work_after_a_while(job: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hooks, "BESIDE_WAIT_S", 0.05)
    slow = Slow()
    with Hooks([slow], job, 0) as told:
        told.checkpoints([Path("step-00000001"), Path("step-00000002")])
    assert slow.ended and [(x["event"], x["waited_s"]) for x in job.run.journal()] == [("beside_abandoned", 0.05)]
    slow.free.set()


def test_a_run_that_stops_does_not_wait_for_work_beside_it(job: Any):
    slow = Slow()
    with pytest.raises(RunStopped), Hooks([slow], job, 0) as told:
        told.checkpoints([Path("step-00000001")])
        raise RunStopped("stopped", 15)
    assert slow.ended and not slow.done.is_set()
    assert [x["event"] for x in job.run.journal()] == ["beside_abandoned"]
    slow.free.set()
