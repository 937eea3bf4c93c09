"""Training on a real Slurm of two nodes, by the shipped batch files: nothing is lost, whatever happens to the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tinylab.cli.command import main
from tinylab.config.io import load_run, run_to_toml
from tinylab.dist import slurm
from tinylab.dist.launch import launch
from tinylab.errors import LaunchError
from tinylab.runs.folder import Run

from .tiny_run import tiny_config

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]  # one cluster, not one for each worker
TEMPLATES = Path(__file__).resolve().parents[2] / "env" / "slurm"


@pytest.fixture(scope="module")
def lab(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the configuration of every run here: 160 steps, a checkpoint after each 20."""
    folder = tmp_path_factory.mktemp("lab")
    config = tiny_config(folder / "words", 160)
    config = replace(config, saving=replace(config.saving, every_tokens=20 * 256))
    (folder / "config.toml").write_text(run_to_toml(config))
    return folder


@pytest.fixture(scope="module")
def undisturbed(lab: Path) -> Run:
    """The run on two ranks of this machine, without Slurm."""
    run = Run(lab / "runs" / "undisturbed")
    command = [sys.executable, "-m", "tinylab.dist.supervisor", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tinylab", "train", str(run.path), "--config", "config.toml"]
    environment = os.environ | {"TINYLAB_HOME": str(lab)}
    done = subprocess.run(command, env=environment, cwd=lab, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(lab: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A new run, whose home is the current folder."""
    monkeypatch.setenv("TINYLAB_HOME", str(lab))
    monkeypatch.chdir(lab)
    return Run(lab / "runs" / request.node.name)


def sbatch(cluster: Any, template: str, run: Run, *options: str, nproc: int = 1) -> str:
    """Submit a shipped file without GPUs; the job."""
    variables = {"RUN": str(run.path), "NPROC": str(nproc), "PYTHON": sys.executable}
    given = ["--gpus-per-node=0", f"--cpus-per-task={nproc}", *options]
    return cluster.ask("sbatch", "--parsable", *given, TEMPLATES / template, "--config", "config.toml", **variables)


def pause(cluster: Any, run: Run) -> list[int]:
    """Stop the two ranks in the middle of the run, so that its end never comes before what is done to it next."""
    cluster.wait(lambda: len(run.metric_records()) > 25, "25 steps must be done")
    ranks = cluster.ranks(2)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    assert run.status()["state"] == "running" and len(run.metric_records()) < 160
    return ranks


def assert_equal_to_the_bit(expected: Run, found: Run) -> None:
    """The same steps, and at the end the same weights, optimizer and random generators."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "data_hash", "validation_loss")
    ours, theirs = ([[repr(r.get(k)) for k in keys] for r in run.metric_records()] for run in (found, expected))
    assert ours == theirs
    ours, theirs = (
        {p.relative_to(last): p.read_bytes() for p in sorted(last.rglob("*.safetensors"))}
        for last in (found.checkpoints()[-1], expected.checkpoints()[-1])
    )
    assert ours == theirs
    assert found.status()["state"] == "done"


def events(run: Run, *wanted: str) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in run.journal() if line["event"] in wanted]


def test_one_node_trains_as_the_same_ranks_without_slurm(cluster: Any, run: Run, undisturbed: Run):
    assert cluster.ended(sbatch(cluster, "single-node.sbatch", run, nproc=2)) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)


def test_two_nodes_train_as_two_ranks_of_one(cluster: Any, run: Run, undisturbed: Run):
    assert cluster.ended(sbatch(cluster, "multi-node.sbatch", run)) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)


def test_at_its_time_limit_a_job_commits_queues_itself_again_and_repeats_no_step(
    cluster: Any, run: Run, undisturbed: Run
):
    job = sbatch(cluster, "multi-node.sbatch", run, "--time=60", "--signal=B:USR1@600")
    paused = pause(cluster, run)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # Slurm looks every 30 s
    log = Path(f"tinylab-{job}.log")
    cluster.wait(lambda: "time limit" in log.read_text(), "Slurm must signal the job")
    for pid in paused:
        os.kill(pid, signal.SIGCONT)
    cluster.wait(lambda: cluster.job(job, "Restarts") == "1", "the job must be queued again")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.ended(job) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)
    (stopped, resumed) = events(run, "stopped", "resumed")
    assert stopped[1] == resumed[1], "no step is repeated"


def test_a_cancelled_job_commits_before_it_ends(cluster: Any, run: Run, undisturbed: Run):
    job = sbatch(cluster, "multi-node.sbatch", run)
    pause(cluster, run)
    cluster.ask("scancel", job)  # Slurm wakes the ranks before it signals them
    assert cluster.ended(job) == "CANCELLED 143:0"
    assert run.status()["state"] == "stopped"
    assert cluster.ended(sbatch(cluster, "multi-node.sbatch", run)) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)
    (stopped, resumed) = events(run, "stopped", "resumed")
    assert stopped[1] == resumed[1], "no step is repeated"


def test_a_node_killed_with_its_slurmd_loses_nothing(cluster: Any, run: Run, undisturbed: Run):
    job = sbatch(cluster, "multi-node.sbatch", run)
    paused = pause(cluster, run)
    cluster.kill_node("n2")
    for pid in paused:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    cluster.wait(lambda: cluster.job(job, "Restarts") == "1", "Slurm must queue the job of a dead node again")
    cluster.start_node("n2")
    assert cluster.ended(job) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)


def test_a_launched_job_is_listed_stopped_and_followed_from_outside(
    cluster: Any, lab: Path, run: Run, undisturbed: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    run = Run(lab / "runs" / "two nodes, 100%j")

    def tinylab(*arguments: str) -> tuple[int, Any]:
        code = main([*arguments, "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    command = ["launch", str(run.path), "--mode", "slurm", "--nodes", "2", "--nproc", "1", "--config", "config.toml"]
    code, launched = tinylab(*command)
    assert (code, launched["mode"], launched["world"]) == (0, "slurm", 2)
    paused = pause(cluster, run)
    (listed,) = (row for row in tinylab("runs")[1] if row["run"] == run.name)
    assert (listed["state"], listed["world"]) == ("running", 2)
    assert main(command) == 1 and "must have one trainer at a time" in capsys.readouterr().err
    threading.Timer(1.0, lambda: [os.kill(pid, signal.SIGCONT) for pid in paused]).start()
    code, stopped = tinylab("stop", str(run.path))
    assert (code, stopped["state"]) == (0, "stopped")
    assert cluster.job(launched["job"], "Restarts") == "0", "a stop is not a time limit"
    code, resumed = tinylab(*command)
    assert code == 0 and resumed["job"] != launched["job"]
    code, ended = tinylab("attach", str(run.path))
    assert (code, ended["state"]) == (0, "done")
    assert_equal_to_the_bit(undisturbed, run)
    assert (run.logs_path / f"slurm-{resumed['job']}.log").exists()


def test_a_job_that_waits_is_cancelled_by_a_stop(
    cluster: Any, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr("tinylab.dist.launch.QUEUE_S", 0.0, raising=False)
    cluster.ask("scontrol", "update", "PartitionName=all", "State=DOWN")
    try:
        handle = launch(load_run("config.toml"), run, mode="slurm")
        assert handle.job() == (handle.record["job"], "PENDING")
        assert handle.stop(timeout=60) == "none"
        assert cluster.job(handle.record["job"], "JobState") == "CANCELLED"
    finally:
        cluster.ask("scontrol", "update", "PartitionName=all", "State=UP")


def test_an_edited_file_that_slurm_refuses_is_answered_in_slurm_s_words(
    cluster: Any, run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    run.logs_path.mkdir(parents=True)
    options = ["--config", str(run.path / "launch.toml")]
    script = slurm.place_script(run, slurm.render(run, nproc=1, gpus=False, threads=1, options=options))
    script.write_text(script.read_text().replace("#SBATCH --nodes", "#SBATCH --partition=gold\n#SBATCH --nodes"))
    with pytest.raises(LaunchError, match="sbatch: error: invalid partition specified: gold"):
        launch(load_run("config.toml"), run, mode="slurm")
    assert "--partition=gold" in script.read_text() and not (run.path / "launch.json").exists()


def test_an_array_of_notebooks_gives_each_its_own_exit_code(cluster: Any, run: Run, tmp_path: Path):
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell("value: int = 0"), nbformat.v4.new_code_cell("print(10 // value)")]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "divide.ipynb")
    for value in (0, 1, 2):
        (tmp_path / f"by{value}.yaml").write_text(f"value: {value}\n")
    variables = {"NOTEBOOK": str(tmp_path / "divide.ipynb"), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    files = sorted(tmp_path.glob("*.yaml"))
    given = ["--array=0-2", "--gpus-per-node=0", "--cpus-per-task=1", TEMPLATES / "papermill-array.sbatch", *files]
    job = cluster.ask("sbatch", "--parsable", *given, **variables)
    ends = [cluster.ended(f"{job}_{task}") for task in range(3)]
    assert ends == ["FAILED 1:0", "COMPLETED 0:0", "COMPLETED 0:0"]
    results = [json.loads((tmp_path / "out" / f"by{value}.ipynb").read_text()) for value in (1, 2)]
    assert [result["cells"][-1]["outputs"][0]["text"] for result in results] == [["10\n"], ["5\n"]]
