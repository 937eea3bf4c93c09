"""A run folder made by a released commit (released/make.py) resumes bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.runs.folder import Run

from .released.make import SAME_ARITHMETIC

RELEASED = Path(__file__).with_name("released")
EXPECTED = json.loads((RELEASED / "expected.json").read_text())
RESUME = "import tinylab; run = tinylab.Run('./run'); tinylab.train(run.config, run, progress=False)"


def resume(folder: Path) -> subprocess.CompletedProcess[str]:
    """Continue the run in a copy of the released folder; corpus and shards are paths relative to it."""
    command = [sys.executable, "-c", RESUME]
    return subprocess.run(command, cwd=folder, env=os.environ | SAME_ARITHMETIC, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(RELEASED, tmp_path / "released")


@pytest.mark.goal("R19")
def test_a_run_of_the_released_commit_resumes_bit_equal(folder: Path):
    ended = resume(folder)
    assert ended.returncode == 0, ended.stderr
    run = Run(folder / "run")
    records: list[dict[str, Any]] = run.metric_records()
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert (resumed["step"], resumed["repeated_steps"]) == (6, 0)
    assert [r["data_hash"] for r in records] == EXPECTED["data_hashes"]
    losses = [float.fromhex(x) for x in EXPECTED["losses"]]
    if torch.__version__ != EXPECTED["torch"]:  # another torch sums in another order, at fp32's unit of 6e-8
        assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-6)
        return
    assert [r["loss"] for r in records] == losses
    last = run.checkpoints()[-1]
    assert last.name == "step-00000012"
    found = {p.relative_to(last).as_posix(): p.read_bytes() for p in last.rglob("*.safetensors")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == EXPECTED["sha256"]


@pytest.mark.parametrize("change", [("lr = 0.01", "lr = 0.02"), ("weight_decay = 0.1", "weight_decay = 0.2")])
def test_a_configuration_changed_under_a_released_checkpoint_is_refused(change: tuple[str, str], folder: Path):
    config = folder / "run" / "config.toml"
    config.write_text(config.read_text().replace(*change))
    ended = resume(folder)
    assert ended.returncode != 0 and "it was written under another one" in ended.stderr


def test_a_config_file_without_a_field_that_came_later_equals_one_with_its_default(folder: Path):
    config = folder / "run" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("compile = false\n", "").replace('decay = "matrices"\n', ""))
    assert config.read_text() != text
    ended = resume(folder)
    assert ended.returncode == 0, ended.stderr
