"""A run folder: private, one trainer at a time, integer order of steps, status that does not lie."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylab.config.presets import tiny
from tinylab.errors import CheckpointError, ConfigError, NothingFoundError
from tinylab.runs.folder import Run, home, list_runs, resolve_run, step_name, step_of
from tinylab.runs.status import STALE_HEARTBEAT_S

HOLD = """
import sys, time
from tinylab.runs.folder import Run
with Run(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "one")
    run.create(tiny(), {"git": None})
    return run


def test_a_created_run_is_private_and_holds_its_whole_configuration(run: Run):
    assert run.config == tiny() and run.exists() and run.name == "one"
    assert json.loads(run.provenance_path.read_text()) == {"git": None}
    assert run.path.stat().st_mode & 0o077 == 0
    assert (run.checkpoints(), run.journal(), run.metric_records(), run.status()) == (
        [],
        [],
        [],
        {"state": "none", "step": 0},
    )


def test_a_folder_without_a_run_says_how_to_start_one(tmp_path: Path):
    with pytest.raises(
        NothingFoundError, match=r"must hold a run \(config\.toml\); found none\. Start one: tinylab train"
    ):
        _ = Run(tmp_path / "none").config


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*/file/run: Not a directory; check the path"):
        Run(tmp_path / "file" / "run").create(tiny(), {})


def test_names_lie_below_runs_and_paths_stay_as_they_are(private_home: Path, tmp_path: Path, monkeypatch):
    assert home() == private_home
    assert resolve_run("demo") == private_home / "runs" / "demo"
    assert resolve_run("a/demo") == Path("a/demo").absolute()
    assert resolve_run(tmp_path / "x") == tmp_path / "x"
    assert resolve_run("~/x") == Path.home() / "x"
    monkeypatch.setenv("TINYLAB_HOME", "~/lab")
    assert resolve_run("demo") == Path.home() / "lab" / "runs" / "demo"
    monkeypatch.chdir(tmp_path)
    Run(tmp_path / "demo").create(tiny(), {})
    assert resolve_run("demo") == tmp_path / "demo"


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_no_run(private_home: Path, name):
    with pytest.raises(ConfigError, match="a run must have a name or a path; found "):
        Run(name)


def test_the_home_of_nobody_is_no_place(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="~nobody-of-this-name/x must name a folder; .*Give a path without ~"):
        Run("~nobody-of-this-name/x")
    monkeypatch.setenv("TINYLAB_HOME", "~nobody-of-this-name")
    with pytest.raises(ConfigError, match="~nobody-of-this-name must name a folder"):
        home()


def test_a_kernel_started_in_the_notebooks_of_a_checkout_finds_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TINYLAB_HOME")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert home() == tmp_path / "notebooks"
    (tmp_path / "tinylab" / "cli").mkdir(parents=True)
    assert home() == tmp_path
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert home() == tmp_path / "mine"


def test_a_new_run_goes_among_no_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("new", "empty", "prepared", "taken", "home"):
        if name != "new":
            (tmp_path / name).mkdir()
    for name in ("stop", "launch.json", "slurm-7.out", "logs", ".config.toml.1.tmp"):
        (tmp_path / "prepared" / name).touch()
    for name in ("new", "empty", "prepared"):
        Run(tmp_path / name).require_place_of_its_own()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(
        ConfigError, match=r"taken must be a run, or a new or empty folder; found 1 other files: thesis"
    ):
        Run(tmp_path / "taken").require_place_of_its_own()
    Run(tmp_path / "taken").create(tiny(), {})
    Run(tmp_path / "taken").require_place_of_its_own()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("~", "/"):
        with pytest.raises(ConfigError, match="must be a run, or a new or empty folder; found "):
            Run(place).require_place_of_its_own()


@pytest.mark.parametrize("name", ["a@3", "a\nb", "a\u202eb", "a\x1b[31m"])
def test_a_new_run_has_a_name_that_can_be_shown(private_home: Path, name: str):
    with pytest.raises(ConfigError, match="the name of a run must not contain (@, which|control characters)"):
        Run(name).require_place_of_its_own()


FULL = """
import sys
from pathlib import Path
from tinylab.config.presets import tiny
from tinylab.errors import CheckpointError
from tinylab.runs.folder import Run
run = Run(Path(sys.argv[1]) / "run")
run.create(tiny(), {})
with run.lock():
    run.write_status("running", 3)
    run.write_journal("started")
    with open(run.path / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            pass
    try:
        run.metrics_log.append({"step": 4, "stage": "x" * 9000})
    except CheckpointError as error:
        print(error)
    run.write_status("failed", 3, reason="full")
    run.write_journal("failed", reason="x" * 5000)
print(run.status()["state"], [line["event"] for line in run.journal()], run.metric_records())
"""


def test_how_a_run_ended_is_written_on_a_full_disk_too(tmp_path: Path):
    """A file system of 256 KiB in a user namespace, filled to its last block."""
    mount = f'mount -t tmpfs -o size=256k none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    command = ["unshare", "-Urm", "sh", "-c", mount, sys.executable, FULL]
    if subprocess.run([*command[:4], "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("user namespaces with mounts are not allowed here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    error, end = done.stdout.splitlines()
    assert "metrics.jsonl: No space left on device (9" in error and "0 bytes free); make room and repeat" in error
    assert end == "failed ['started', 'failed'] []", done.stderr


def test_runs_are_listed_by_name(private_home: Path):
    assert list_runs() == []
    for name in ("b", "a"):
        Run(name).create(tiny(), {})
    (private_home / "runs" / "no-run").mkdir()
    assert [r.name for r in list_runs()] == ["a", "b"]


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(960_000, 1_040_000), (9_999_999, 10_000_000), (99_999_999, 100_000_000)])
def test_the_newest_checkpoint_is_the_one_of_the_largest_number(run: Run, steps):
    for step in reversed(steps):
        folder = run.checkpoints_path / step_name(step)
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    assert [step_of(p.name) for p in run.checkpoints()] == list(steps)


def test_stray_and_unfinished_folders_are_no_checkpoints(run: Run):
    for name in ("step-00000001", ".tmp-step-00000002", "step-3", "step-00000004.old", "best", "step-0000000x"):
        (run.checkpoints_path / name).mkdir()
        if name != "step-00000001":
            (run.checkpoints_path / name / "manifest.json").write_text("{}")
    (run.checkpoints_path / "step-00000005").write_text("a file")
    assert run.checkpoints() == []


@pytest.mark.parametrize("step", [0, 1, 99_999_999, 100_000_000, 1_234_567_890])
def test_step_names_are_read_back_as_integers(step):
    assert step_of(step_name(step)) == step


def test_other_names_hold_no_step():
    assert [step_of(n) for n in ("step-1", "step-", "xstep-00000001", "step-00000001 ", "step-000000x1")] == [None] * 5


# ---- one trainer at a time ------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_the_holder_and_let_in_after_a_kill(run: Run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        message = rf"one trainer at a time; found another \(pid {holder.pid} on .*\)\. Wait for it, stop it, or"
        with pytest.raises(CheckpointError, match=message), run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run.lock():
        pass
    with run.lock():  # freed at the end of the block
        pass


def test_the_lock_is_freed_by_an_error_inside(run: Run):
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass


# ---- status and journal ---------------------------------------------------------------------------------------------


def test_status_of_a_living_process_is_what_it_wrote(run: Run):
    run.write_status("running", 7, tokens=70)
    status = run.status()
    assert (status["state"], status["step"], status["tokens"], status["pid"]) == ("running", 7, 70, os.getpid())
    assert abs(status["heartbeat"] - time.time()) < 60


def write_status(run: Run, **changes: object) -> None:
    record = {"state": "running", "step": 3, "pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
    run.status_path.write_text(json.dumps(record | changes))


def test_a_run_whose_process_is_gone_or_silent_is_lost(run: Run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale = time.time() - STALE_HEARTBEAT_S - 5
    write_status(run, pid=gone.pid)
    assert run.status()["state"] == "lost"
    write_status(run, heartbeat=stale)
    assert run.status()["state"] == "lost"
    write_status(run, host="elsewhere", pid=gone.pid)
    assert run.status()["state"] == "running"
    write_status(run, host="elsewhere", heartbeat=stale)
    assert run.status()["state"] == "lost"
    write_status(run, state="done", pid=gone.pid, heartbeat=stale)
    assert run.status()["state"] == "done"


def test_a_process_of_another_user_counts_by_its_heartbeat(run: Run, monkeypatch):
    def not_ours(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", not_ours)
    write_status(run)
    assert run.status()["state"] == "running"
    write_status(run, heartbeat=time.time() - STALE_HEARTBEAT_S - 5)
    assert run.status()["state"] == "lost", "the number was given to another process"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "running"}', '{"state": "running", "host": 3}'])
def test_an_unreadable_status_is_none(run: Run, text):
    run.status_path.write_text(text)
    assert run.status() == {"state": "none", "step": 0}


def test_the_journal_keeps_order_and_survives_a_torn_line(run: Run):
    run.write_journal("started", step=0)
    run.write_journal("committed", step=5)
    with open(run.journal_path, "a") as file:
        file.write('{"event": "comm')
    assert [(e["event"], e["step"]) for e in run.journal()] == [("started", 0), ("committed", 5)]
    run.journal_log.repair([])
    run.write_journal("resumed", step=5)
    assert [e["event"] for e in run.journal()] == ["started", "committed", "resumed"]
    times = [e["time"] for e in run.journal()]
    assert times == sorted(times)


def test_metrics_are_a_table_with_one_row_per_step(run: Run):
    from tinylab.runs.metrics import MetricsLog

    log = MetricsLog(run.metrics_path)
    log.append({"step": 1, "loss": 2.0, "validation_loss": 3.0})
    log.append({"step": 2, "loss": 1.5})
    table = run.metrics()
    assert table["step"].tolist() == [1, 2] and table["loss"].tolist() == [2.0, 1.5]
    assert table["validation_loss"].isna().tolist() == [False, True]


@pytest.mark.parametrize("doing", [{}, {"heartbeat": time.time() - 3600}], ids=["trains", "is stuck"])
def test_a_trainer_on_another_host_holds_the_folder_though_no_lock_reaches_it(run: Run, doing: dict):
    run.write_status("running", 7, host="node9", pid=4321, **doing)
    before = run.status_path.read_bytes()
    with (
        pytest.raises(
            CheckpointError, match=r"found another \(pid 4321 on node9, alive \d+ s ago\).*if that host is down"
        ),
        run.lock(),
    ):
        pass
    assert run.status_path.read_bytes() == before


def test_a_trainer_on_another_host_that_has_gone_silent_or_ended_holds_nothing(run: Run):
    long_ago = time.time() - 3600
    run.write_status("running", 7, host="node9", pid=4321, heartbeat=long_ago, alive=long_ago)
    with run.lock():
        pass
    run.write_status("stopped", 7, host="node9", pid=4321)
    with run.lock():
        pass
