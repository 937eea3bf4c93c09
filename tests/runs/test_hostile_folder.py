"""A run folder from anybody: nothing outside it is changed, nothing waits for ever, one bad folder hides no other."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinylab.cli.command import main
from tinylab.config.presets import tiny
from tinylab.errors import CheckpointError, ConfigError, TinylabError
from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import Run

FILES = ("config.toml", "status.json", "journal.jsonl", "metrics.jsonl", "lock", "attention.json")
STEP = {"step": 1, "tokens": 256, "loss": 2.0}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A call that waits for the other end of a FIFO fails instead of hanging."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def run(private_home: Path) -> Run:
    run = Run("one")
    run.create(tiny(), {"git": None})
    run.write_status("stopped", 1)
    run.write_journal("started", step=0)
    run.metrics_path.write_text(json.dumps(STEP) + "\n")
    return run


def put_link(path: Path) -> None:
    victim = path.parent.parent / "victim"
    victim.write_text("precious\n")
    path.symlink_to(victim)


def put_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a symbolic link": put_link,
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": put_socket,
}


def use(run: Run) -> list[str]:
    """Every reader and writer of the run's files; the messages of those that refuse."""
    messages = []

    def hold() -> None:
        with run.lock():
            pass

    for action in (
        hold,
        lambda: run.config,
        run.status,
        run.journal,
        run.metric_records,
        lambda: run.write_journal("resumed"),
        lambda: run.metrics_log.append({**STEP, "step": 2}),
        lambda: run.metrics_log.cut_after(1),
        lambda: run.write_status("stopped", 2),
    ):
        try:
            action()
        except TinylabError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_refused_and_what_it_points_to_stays(run: Run, name: str, kind: str):
    path = run.path / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    messages = use(run)
    victim = run.path.parent / "victim"
    assert not victim.exists() or victim.read_text() == "precious\n"
    assert all(str(path) in message for message in messages)
    if name not in ("status.json", "attention.json"):
        assert any(f"must be a regular file; found {kind}. Move it away and repeat" in m for m in messages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES[:-2])
def test_runs_lists_every_other_run_beside_a_hostile_one(run: Run, name: str, kind: str, capsys: Any):
    good = Run("two")
    good.create(tiny(), {})
    path = run.path / name
    path.unlink()
    KINDS[kind](path)
    assert main(["runs", "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["two"]["state"] == "none"


@pytest.mark.parametrize("status", ['"heartbeat": "soon"', '"heartbeat": NaN', '"heartbeat": 1e400', '"pid": 1e30'])
@pytest.mark.parametrize("state", ["running", "done", "stopped"])
def test_runs_lists_every_run_beside_one_with_a_bad_status(run: Run, status: str, state: str, capsys: Any):
    good = Run("two")
    good.create(tiny(), {})
    record = {"state": state, "step": 3, "pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
    run.status_path.write_text(f"{json.dumps(record)[:-1]}, {status}}}")
    assert main(["runs", "--json"]) == 0
    assert {row["run"] for row in json.loads(capsys.readouterr().out)} == {"one", "two"}


@pytest.mark.parametrize("pid", [0, -1, 2**31, 10**30, True, "1"])
def test_a_process_number_that_no_process_has_is_no_status(run: Run, pid: object):
    record = {"state": "running", "step": 3, "pid": pid, "host": socket.gethostname(), "heartbeat": time.time()}
    run.status_path.write_text(json.dumps(record))
    assert run.status() == {"state": "none", "step": 0}


def test_a_status_of_brackets_or_of_a_terabyte_is_none(run: Run):
    run.status_path.write_text("[" * 100_000)
    assert run.status()["state"] == "none"
    os.truncate(run.status_path, 2**40)
    assert run.status()["state"] == "none"


def test_a_log_with_a_hole_of_a_terabyte_is_named_and_repaired(run: Run):
    os.truncate(run.metrics_path, 2**40)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line at byte \d+ must end within 8388608 bytes"):
        run.metric_records()
    notes = run.metrics_log.repair([])
    assert len(notes) == 1 and "must end within" in notes[0] and "quarantine/metrics.jsonl" in notes[0]
    assert run.metric_records() == [STEP]


def test_a_line_of_ten_megabytes_is_named_and_repaired(run: Run):
    with open(run.journal_path, "a") as file:
        file.write(json.dumps({"event": "x" * 10_000_000, "time": 1.0}) + "\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl, line at byte \d+ must end within"):
        run.journal()
    assert len(run.journal_log.repair([])) == 1
    assert [line["event"] for line in run.journal()] == ["started"]


def test_a_temporary_name_taken_by_a_link_is_not_written_through(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".status.json.{os.getpid()}.tmp").symlink_to(victim)
    write_atomic(tmp_path / "status.json", "new")
    assert victim.read_text() == "precious" and (tmp_path / "status.json").read_text() == "new"


def test_a_configuration_larger_than_a_megabyte_is_refused(run: Run):
    os.truncate(run.config_path, 2_000_000)
    with pytest.raises(CheckpointError, match=r"config\.toml must have at most 1000000 bytes; found 2000000"):
        _ = run.config


def test_the_path_of_a_run_without_nul():
    with pytest.raises(ConfigError, match=r"the path of a run must not hold NUL; found 'a\\x00b'"):
        Run("a\0b")


def test_the_name_of_a_run_is_shown_without_control_characters(private_home: Path):
    assert Run("a\nb\x1b[31m\u202ec").name == r"a\nb\x1b[31m\u202ec"
    assert Run("größer 1").name == "größer 1"
