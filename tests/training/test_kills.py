"""Nothing is lost: a run killed anywhere and started again with the same configuration ends bit-equal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import override, run_to_toml
from tinylab.config.schema import RunConfig
from tinylab.runs.folder import Run

PACKAGE = Path(__file__).resolve().parents[2] / "tinylab"
LABELS = sorted(
    {
        label
        for file in PACKAGE.rglob("*.py")
        for label in re.findall(r"""failpoint\(\s*["']([^"']+)["']""", file.read_text(encoding="utf-8"))
    }
)
"""Every labelled point of the source."""


def test_every_point_of_the_protocol_is_labelled():
    """The labels above are found in the source, so a new one is tested from its first day."""
    kinds = {label.partition(".")[0] for label in LABELS}
    assert {"open", "save", "commit", "prune", "begin", "ranks", "resume", "step", "end"} <= kinds


@pytest.mark.parametrize("label", [x for x in LABELS if not x.startswith(("resume.", "prepare.", "ranks."))])
@pytest.mark.goal("R2")
def test_kill_at_every_labelled_point_loses_nothing(
    label: str, trainer: Any, pruned_config: RunConfig, pruned_reference: Run, assert_nothing_lost: Any, tmp_path: Path
):
    run = Run(tmp_path / "run")
    hits = [1] if label.startswith(("open.", "begin.", "end.")) else [1, 1] if label.startswith("prune.") else [1, 2]
    for hit in hits:
        killed = trainer.go(run.path, pruned_config, failpoint=f"{label}:{hit}")
        assert killed.code == -signal.SIGKILL, f"{label}:{hit} was not reached: {killed}"
    ended = trainer.go(run.path, pruned_config)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(pruned_reference, run)


@pytest.mark.parametrize("label", [x for x in LABELS if x.startswith(("prepare.", "commit."))])
def test_kill_while_preparing_the_data_loses_nothing(
    label: str, trainer: Any, pruned_config: RunConfig, pruned_reference: Run, assert_nothing_lost: Any, tmp_path: Path
):
    run, home = Run(tmp_path / "run"), tmp_path / "home"
    killed = trainer.go(run.path, pruned_config, failpoint=label, home=home)
    assert killed.code == -signal.SIGKILL, f"{label} was not reached: {killed}"
    ended = trainer.go(run.path, pruned_config, home=home)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(pruned_reference, run)
    assert [p.name for p in (home / "data").iterdir() if p.name.startswith(".tmp")] == []


@pytest.mark.parametrize("before", ["commit.renamed", "save.weights_written", "step.logged:7"])
@pytest.mark.parametrize("label", [x for x in LABELS if x.startswith(("resume.", "begin."))])
@pytest.mark.goal("R2")
def test_kill_while_resuming_loses_nothing(
    before: str,
    label: str,
    trainer: Any,
    pruned_config: RunConfig,
    pruned_reference: Run,
    assert_nothing_lost: Any,
    tmp_path: Path,
):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, pruned_config, failpoint=before).code == -signal.SIGKILL
    if label == "resume.set_aside":
        (run.checkpoints_path / "step-00000023" / "trainer").mkdir(parents=True)
    killed = trainer.go(run.path, pruned_config, failpoint=label)
    if label == "resume.journaled" and before != "commit.renamed":
        assert killed.code == 0, "no committed line was missing"
    else:
        assert killed.code == -signal.SIGKILL, f"{label} was not reached: {killed}"
    ended = trainer.go(run.path, pruned_config)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(pruned_reference, run)


RANKS_POINTS = [x for x in LABELS if x.startswith(("save.", "commit.", "prune.", "ranks.", "resume.", "begin."))]
QUICK_POINTS = {
    ("ddp", "ranks.part_written"),
    ("ddp", "prune.renamed"),
    ("fsdp", "save.weights_written"),
    ("fsdp", "commit.renamed"),
}


@pytest.fixture(scope="session")
def pair_reference(trainer: Any, pruned_config: RunConfig) -> Callable[[str], tuple[RunConfig, Run]]:
    """The run of two ranks with retention that nobody disturbs, by strategy, and its configuration."""
    made: dict[str, tuple[RunConfig, Run]] = {}

    def get(strategy: str) -> tuple[RunConfig, Run]:
        if strategy not in made:
            config = override(pruned_config, [f"parallel.strategy={strategy}"])
            run = Run(trainer.folder / f"pair-{strategy}")
            ended = trainer.go(run.path, config, ranks=2)
            assert ended.code == 0, ended.stderr
            made[strategy] = config, run
        return made[strategy]

    return get


@pytest.mark.parametrize(
    ("strategy", "label"),
    [
        pytest.param(s, x, marks=() if (s, x) in QUICK_POINTS else pytest.mark.stress)
        for s in ("ddp", "fsdp")
        for x in RANKS_POINTS
    ],
)
@pytest.mark.goal("R2")
def test_kill_of_two_ranks_at_every_labelled_point_loses_nothing(
    strategy: str,
    label: str,
    trainer: Any,
    pair_reference: Callable[[str], tuple[RunConfig, Run]],
    assert_nothing_lost: Any,
    tmp_path: Path,
):
    """Two ranks with sharded and with replicated weights; the rank that gets there is killed, the other one ends."""
    config, reference = pair_reference(strategy)
    run = Run(tmp_path / "run")
    if label.startswith("resume."):
        assert trainer.go(run.path, config, failpoint="commit.renamed", ranks=2).code == -signal.SIGKILL
    if label == "resume.set_aside":
        (run.checkpoints_path / "step-00000023" / "trainer").mkdir(parents=True)
    for hit in [1, 2] if label.startswith(("save.", "commit.", "ranks.")) else [1]:
        killed = trainer.go(run.path, config, failpoint=f"{label}:{hit}", ranks=2)
        assert killed.code == -signal.SIGKILL, f"{label}:{hit} was not reached: {killed}"
    ended = trainer.go(run.path, config, ranks=2)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(reference, run)


@pytest.mark.parametrize("save", [2, 9])
def test_a_rank_killed_while_it_writes_its_part_ends_the_others_within_seconds(
    save: int,
    trainer: Any,
    pair_reference: Callable[[str], tuple[RunConfig, Run]],
    assert_nothing_lost: Any,
    tmp_path: Path,
):
    """Rank 0 waits for the part of rank 1 beside a step (save 2), and at the end of the run (save 9)."""
    config, reference = pair_reference("fsdp")
    run = Run(tmp_path / "run")
    killed = trainer.go(run.path, config, failpoint=f"ranks.part_written:{save}", failpoint_rank=1, ranks=2)
    assert killed.code == -signal.SIGKILL
    assert "LaunchError: all 2 ranks must live to the end; rank 0 found another one gone" in killed.stderr
    assert len(run.checkpoints()) < len(reference.checkpoints())
    ended = trainer.go(run.path, config, ranks=2)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(reference, run)


def test_random_generators_go_on_where_the_checkpoint_left_them(trainer: Any, assert_nothing_lost: Any, tmp_path: Path):
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    assert trainer.go(whole.path, draws=True).code == 0
    assert trainer.go(cut.path, draws=True, failpoint="step.logged:14").code == -signal.SIGKILL
    assert trainer.go(cut.path, draws=True).code == 0
    assert_nothing_lost(whole, cut)
    states = {(p / "trainer" / "rng.safetensors").read_bytes() for p in whole.checkpoints()}
    assert len(states) == len(whole.checkpoints()), "the state moves with every step"


def test_kill_of_the_real_command_loses_nothing(
    trainer: Any, tiny_config: RunConfig, reference: Run, assert_nothing_lost: Any, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    config = tmp_path / "config.toml"
    config.write_text(run_to_toml(tiny_config))
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "tinylab", "train", str(run.path), "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.stderr
    process.stderr.readline()  # the first step is done
    process.kill()
    process.wait()
    process.stderr.close()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_nothing_lost(reference, run)
