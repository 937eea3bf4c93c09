"""Training on a real Slurm of two nodes, by the shipped batch files: nothing is lost, whatever happens to the job."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.runs.folder import Run

pytestmark = pytest.mark.slurm
TEMPLATES = Path(__file__).resolve().parents[2] / "env" / "slurm"


@pytest.fixture(scope="module")
def lab(cluster: Any, tmp_path_factory: pytest.TempPathFactory, tiny_config: RunConfig) -> Path:
    """A home folder with the configuration of every run here: 160 steps, a checkpoint after each 20."""
    folder = tmp_path_factory.mktemp("lab")
    config = replace(
        tiny_config,
        stages=tuple(replace(stage, tokens=80 * 256) for stage in tiny_config.stages),
        saving=replace(tiny_config.saving, every_tokens=20 * 256),
        validation=replace(tiny_config.validation, every_tokens=40 * 256),
    )
    (folder / "config.toml").write_text(run_to_toml(config))
    return folder


@pytest.fixture(scope="module")
def undisturbed(lab: Path) -> Run:
    """The run on two ranks of this machine, without Slurm."""
    run = Run(lab / "runs" / "undisturbed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
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


def test_one_node_trains_as_the_same_ranks_without_slurm(cluster: Any, run: Run, undisturbed: Run):
    assert cluster.ended(sbatch(cluster, "single-node.sbatch", run, nproc=2)) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)


def test_two_nodes_train_as_two_ranks_of_one(cluster: Any, run: Run, undisturbed: Run):
    assert cluster.ended(sbatch(cluster, "multi-node.sbatch", run)) == "COMPLETED 0:0"
    assert_equal_to_the_bit(undisturbed, run)
