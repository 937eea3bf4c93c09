"""Runs that outlive whoever launched them: real, very small ones, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

import tinylab
from tinylab.config.io import run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.dist.handle import Handle
from tinylab.dist.launch import launch
from tinylab.errors import CheckpointError, ConfigError, LaunchError, NothingFoundError
from tinylab.runs.folder import Run
from tinylab.runs.summary import run_summary

from .tiny_run import tiny_config, until

LONG = 1_000_000
"""Steps of a run that somebody has to stop."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 12 steps whose data are prepared."""
    from tinylab.data.prepare import prepare

    config = tiny_config(tmp_path_factory.mktemp("words"), 12)
    prepare(config.data, progress=lambda line: None)
    return config


def long(config: RunConfig) -> RunConfig:
    return replace(config, stages=(replace(config.stages[0], tokens=LONG * 256),))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run folder of this test; what still trains there in the end is killed."""
    made = Run(tmp_path / "mine")
    yield made
    pids = [Handle(made).record.get("pid"), made.status().get("pid")]
    for pid in {pid for pid in pids if pid and Handle(made).is_alive()}:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def is_gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def test_two_ranks_are_launched_followed_row_by_row_and_end(run: Run, prepared: RunConfig):
    handle = launch(prepared, run, nproc=2)
    assert handle.state() in ("running", "done")
    rows: list[dict[str, Any]] = []
    assert handle.attach(rows.append, timeout=120) == 0
    assert rows == run.metric_records()
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert run_summary(run)["world"] == 2
    assert sorted(p.name for p in run.logs_path.glob("rank-*")) == ["rank-0.log", "rank-1.log"]
    assert "done at step 12 of 12" in handle.tail(0)
    with pytest.raises(NothingFoundError, match="rank 2; found logs of: rank-0, rank-1"):
        handle.tail(2)
    record = json.loads((run.path / "launch.json").read_text())
    assert {k: record[k] for k in ("mode", "world", "nodes", "nproc", "tied")} == {
        "mode": "torchrun", "world": 2, "nodes": 1, "nproc": 2, "tied": False,
    }  # fmt: skip
    until(lambda: is_gone(record["pid"]))
    assert launch(None, run, nproc=1).wait(timeout=60) == 0, "a finished run is left as it is"
    assert run.metric_records() == rows


def test_two_nodes_are_launched_by_the_same_call_on_each(run: Run, prepared: RunConfig, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "run.toml").write_text(run_to_toml(prepared))
    command = [sys.executable, "-m", "tinylab", "launch", str(run.path), "--config", str(tmp_path / "run.toml")]
    command += ["--nproc", "1", "--nodes", "2", "--rendezvous", rendezvous, "--json"]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(node.communicate(timeout=120)[0]) for node in nodes]
    assert [(answer["mode"], answer["world"]) for answer in answers] == [("torchrun", 2)] * 2
    assert Handle(run).wait(timeout=120) == 0
    assert [row["step"] for row in run.metric_records()] == list(range(1, 13))
    assert run_summary(run)["world"] == 2
    assert sorted(p.name for p in run.logs_path.glob("rank-*")) == ["rank-0.log", "rank-1.log"]


def test_a_run_is_stopped_through_its_folder_and_resumed_on_another_number_of_ranks(run: Run, prepared: RunConfig):
    config = long(prepared)
    handle = launch(config, run, nproc=2)
    until(run.metric_records)
    with pytest.raises(LaunchError, match=r"must have one trainer at a time; found another \(pid \d+ on .*, step \d+"):
        launch(config, run, mode="process")
    pids = children_of(handle.record["pid"])
    assert len(pids) == 2
    assert tinylab.attach(run.path).stop(timeout=60) == "stopped"
    until(lambda: all(is_gone(pid) for pid in (*pids, handle.record["pid"])))
    assert not (run.path / "stop").exists()
    assert handle.exit_code() == 143
    last = run.metric_records()[-1]["step"]
    again = launch(None, run, mode="process")
    until(lambda: len(run.metric_records()) > last)
    assert again.stop(timeout=60) == "stopped"
    assert [r["step"] for r in run.metric_records()] == list(range(1, len(run.metric_records()) + 1))
    assert [e["step"] for e in run.journal() if e["event"] == "resumed"] == [last]
    assert again.stop() == "stopped", "a run that does not train is left as it is"


def test_a_trainer_that_ends_before_it_stands_fails_the_launch_in_its_own_words(run: Run, prepared: RunConfig):
    run.create(prepared, {})
    run.write_journal("started", step=0, tokens=0)
    with pytest.raises(ConfigError, match="1 keys differ: seed = 7 asked, 3407 in the run"):
        launch(replace(prepared, seed=7), run, mode="process")
    assert not Handle(run).is_alive()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "remote"}, "mode must be one of auto, process, torchrun, slurm; found 'remote'"),
        ({"nproc": 0}, "nproc and nodes must be at least 1; found nproc = 0"),
        ({"nproc": 2, "mode": "process"}, "must be 1 in mode process; found nproc = 2"),
        ({"nproc": 3}, r"the number of ranks \(3\) must divide the sequences of a step \(8\)"),
        ({"nodes": 2}, "2 nodes must meet somewhere; found no rendezvous"),
    ],
)
def test_what_cannot_be_started_is_refused_before_anything_is_made(
    run: Run, prepared: RunConfig, settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        launch(prepared, run, **settings)
    assert not run.path.exists()


def test_attaching_to_no_run_is_refused(run: Run):
    with pytest.raises(NothingFoundError, match="must hold a run"):
        tinylab.attach(run.path)


def test_following_ends_when_the_folder_vanishes_or_its_time_is_over(run: Run, prepared: RunConfig, tmp_path: Path):
    run.create(prepared, {})
    run.write_status("running", 3)  # by this process, which lives
    with pytest.raises(LaunchError, match=r"must end within 0.1 s; it still trains"):
        Handle(run).attach(timeout=0.1)
    with pytest.raises(LaunchError, match=r"must stop within 0.1 s; it still trains: pid \d+ on .*, step 3"):
        Handle(run).stop(timeout=0.1)
    assert (run.path / "stop").exists(), "the request stands"
    run.path.rename(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="must stay where it is while its run is followed; it is gone"):
        Handle(run).attach()


PARENT = """
import sys, time, tinylab
from tinylab.config.io import load_run
tinylab.launch(load_run(sys.argv[1]), sys.argv[2], mode=sys.argv[3], nproc=1)
print("stands", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("mode", ["torchrun", "process"])
def test_under_papermill_a_run_commits_and_ends_when_its_parent_is_killed(
    run: Run, prepared: RunConfig, tmp_path: Path, mode: str
):
    (tmp_path / "run.toml").write_text(run_to_toml(long(prepared)))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "run.toml"), str(run.path), mode]
    environment = os.environ | {"TINYLAB_EXECUTOR": "papermill"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout and parent.stdout.readline() == "stands\n"
        handle = Handle(run)
        assert handle.record["tied"] is True
        until(run.metric_records)
        assert handle.is_alive()
        parent.kill()
    until(lambda: not handle.is_alive())
    assert handle.exit_code() == 143
    assert run.checkpoints()[-1].name == f"step-{run.metric_records()[-1]['step']:08d}"


def execute(manager: KernelManager, code: str) -> str:
    """What a cell prints."""
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        printed: list[str] = []

        def note(message: dict[str, Any]) -> None:
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))

        client.execute_interactive(code, timeout=120, output_hook=note)
        return "".join(printed)
    finally:
        client.stop_channels()


REATTACH = "import tinylab; h = tinylab.attach({path!r}); r = []\n"
REATTACH += "try: h.attach(r.append, timeout=0.1)\nexcept tinylab.errors.LaunchError: print([x['step'] for x in r])"


@pytest.mark.filterwarnings("ignore:Parent appears to have exited:RuntimeWarning")
@pytest.mark.goal("R12")
def test_a_run_survives_whatever_happens_to_the_kernel_that_launched_it(
    run: Run, prepared: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "run.toml").write_text(run_to_toml(long(prepared)))
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    try:
        code = "import tinylab\nfrom tinylab.config.io import load_run\n"
        code += f"handle = tinylab.launch(load_run({str(tmp_path / 'run.toml')!r}), {str(run.path)!r}, nproc=1)\n"
        assert execute(manager, code + "print(handle.state())") == "running\n"
        trainer = run.status()["pid"]

        def trains_on() -> None:
            seen = len(run.metric_records())
            until(lambda: len(run.metric_records()) > seen)
            assert run.status()["pid"] == trainer

        manager.interrupt_kernel()
        trains_on()
        manager.restart_kernel(now=False)
        trains_on()
        steps = json.loads(execute(manager, REATTACH.format(path=str(run.path))))
        assert steps == list(range(1, len(steps) + 1)), "no row is missing after a new kernel attaches"
        kernel = manager.provisioner.pid  # type: ignore[union-attr]
        os.kill(kernel, signal.SIGKILL)
        trains_on()
        manager.restart_kernel(now=True)
        manager.shutdown_kernel(now=False)
        trains_on()
        assert Handle(run).stop(timeout=60) == "stopped"
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def test_a_log_that_is_a_fifo_is_named_and_nobody_waits_for_it(run: Run):
    run.logs_path.mkdir(parents=True)
    os.mkfifo(run.logs_path / "rank-0.log")
    with pytest.raises(CheckpointError, match=r"rank-0\.log must be a regular file; found a FIFO"):
        Handle(run).tail()


def test_the_tail_of_a_huge_log_is_its_last_lines(run: Run):
    run.logs_path.mkdir(parents=True)
    (run.logs_path / "rank-0.log").write_text("a line\n" * 2**19 + "the last one\n")
    assert Handle(run).tail(lines=2) == "a line\nthe last one"
