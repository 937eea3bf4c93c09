"""Metrics and journal damaged between two starts of a run: named by line, restored, and never the end of the run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import override
from tinylab.runs.effective_time import effective_time
from tinylab.runs.folder import Run

KILL = int(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(trainer: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run killed in step 17, after the checkpoint of step 15."""
    run = Run(tmp_path_factory.mktemp("killed") / "run")
    assert trainer.go(run.path, signal_at=(17, KILL)).code == -KILL
    return run


@pytest.fixture
def run(killed: Run, tmp_path: Path) -> Run:
    return Run(shutil.copytree(killed.path, tmp_path / "run"))


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def drop(lines: list[bytes]) -> list[bytes]:
    return lines[:2] + lines[3:]


def alter(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b'"step": ', b'"step": 1'), *lines[3:]]


def misspell(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b'"to', b'"ot').replace(b'"ev', b'"ve'), *lines[3:]]


def tear(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"{" + lines[2], *lines[3:]]


def same_lines(run: Run, reference: Run) -> bool:
    pairs = zip(run.metric_records(), reference.metric_records(), strict=True)
    return all((a["step"], a["loss"], a["data_hash"]) == (b["step"], b["loss"], b["data_hash"]) for a, b in pairs)


@pytest.mark.parametrize("log, change", [("metrics", alter), ("metrics", misspell), ("journal", tear)])
def test_a_damaged_log_is_said_and_restored_at_the_next_start(
    run: Run, reference: Run, trainer: Any, log: str, change: Callable[[list[bytes]], list[bytes]]
):
    path = run.path / f"{log}.jsonl"
    before = path.read_bytes().splitlines()[:8]
    edit(path, change)
    ended = trainer.go(run.path)
    assert ended.code == 0, ended.stderr
    assert f"warning: {path}: " in ended.stderr and "restored from" in ended.stderr
    assert path.read_bytes().splitlines()[:8] == before
    assert same_lines(run, reference)
    (repaired,) = (line for line in run.journal() if line["event"] == "repaired")
    assert repaired["step"] == 15 and str(path) in repaired["problems"][0]
    assert [line["step"] for line in run.journal() if line["event"] == "committed"] == [1, 2, 4, 5, 10, 12, 15, 20, 24]


@pytest.mark.parametrize("name", ["metrics.jsonl", "journal.jsonl"])
def test_a_removed_log_is_said_and_restored(run: Run, reference: Run, trainer: Any, name: str):
    (run.path / name).unlink()
    ended = trainer.go(run.path)
    assert ended.code == 0 and "lines that step-00000015 sealed are missing; restored from" in ended.stderr
    assert same_lines(run, reference)
    events = [line["event"] for line in run.journal()]
    assert events[0] == "started" and "resumed" in events


def test_removed_logs_without_a_copy_are_said_and_the_run_goes_on(run: Run, reference: Run, trainer: Any):
    for path in (run.metrics_path, run.journal_path):
        path.unlink()
    shutil.rmtree(run.path / "sealed")
    ended = trainer.go(run.path)
    assert ended.code == 0 and ended.stderr.count("they cannot be restored") == 2
    assert "does not say how the run began" in ended.stderr
    assert [r["step"] for r in run.metric_records()] == list(range(16, 25))
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert resumed["step"] == 15


def test_a_finished_run_is_repaired_by_the_same_command(reference: Run, trainer: Any, tmp_path: Path):
    run = Run(shutil.copytree(reference.path, tmp_path / "run"))
    whole = run.metrics_path.read_bytes()
    edit(run.metrics_path, lambda lines: [*drop(lines), lines[-1].replace(b'"step": 24', b'"step": 25')])
    ended = trainer.go(run.path)
    assert ended.code == 0 and "1 of 24 sealed lines missing" in ended.stderr and "is finished" in ended.stderr
    assert run.metrics_path.read_bytes() == whole


def test_a_run_without_seals_resumes_and_seals_from_then_on(run: Run, trainer: Any, reference: Run):
    """Checkpoints of an earlier version hold no seal."""
    from hashlib import sha256

    shutil.rmtree(run.path / "sealed")
    for folder in run.checkpoints():
        path, manifest = folder / "trainer" / "trainer.json", folder / "manifest.json"
        record, files = json.loads(path.read_text()), json.loads(manifest.read_text())
        del record["metrics"], record["journal"]
        path.write_text(json.dumps(record))
        entry = {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        files["files"]["trainer/trainer.json"] = entry
        manifest.write_text(json.dumps(files))
    ended = trainer.go(run.path)
    assert ended.code == 0 and "warning" not in ended.stderr, ended.stderr
    assert same_lines(run, reference)
    record = json.loads((run.checkpoints()[-1] / "trainer" / "trainer.json").read_text())
    assert record["metrics"]["lines"] == 24 and record["journal"]["lines"] >= 10


def test_every_checkpoint_seals_the_steps_before_it(reference: Run):
    for folder in reference.checkpoints():
        record = json.loads((folder / "trainer" / "trainer.json").read_text())
        assert record["metrics"]["lines"] == record["step"]


@pytest.mark.parametrize("step", [15, 4])
def test_a_checkpoint_that_vanished_is_said(run: Run, trainer: Any, reference: Run, step: int):
    shutil.rmtree(run.checkpoints_path / f"step-{step:08d}")
    ended = trainer.go(run.path)
    assert (
        ended.code == 0 and f"lacks what was committed: step-{step:08d}; the run continues after step " in ended.stderr
    )
    assert same_lines(run, reference)


def test_pruned_and_quarantined_checkpoints_have_not_vanished(trainer: Any, pruned_config: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, pruned_config, signal_at=(23, KILL)).code == -KILL
    (run.checkpoints_path / "step-00000020" / "config.json").unlink()
    for _ in range(2):
        ended = trainer.go(run.path, pruned_config, signal_at=(23, KILL))
        assert "lacks what was committed" not in ended.stderr, ended.stderr


def test_the_time_of_a_killed_run_is_accounted_for(run: Run, trainer: Any):
    assert trainer.go(run.path).code == 0
    journal, metrics = run.journal(), run.metric_records()
    found = effective_time(journal, metrics)
    first, resumed = (next(x for x in journal if x["event"] == event) for event in ("started", "resumed"))
    assert found.wall_s == pytest.approx(journal[-1]["time"] - first["time"] + first["restart_s"], abs=0.01)
    assert found.parts["steps"] + found.parts["data_wait"] == pytest.approx(sum(r["step_time_s"] for r in metrics))
    assert found.parts["repeated"] == resumed["repeated_s"] > 0
    assert found.parts["restart"] == pytest.approx(first["restart_s"] + resumed["restart_s"])
    assert found.parts["save"] > 0 and found.parts["validation"] > 0
    assert first["time"] < resumed["last_seen"] < resumed["time"] - resumed["restart_s"]
    assert found.ratio == pytest.approx(found.parts["steps"] / found.wall_s)


def test_a_configuration_that_failed_in_preparation_does_not_keep_the_folder(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    failed = trainer.go(run.path, override(trainer.config, ["data.sources.0.corpus=files:/none/at/all.jsonl"]))
    assert failed.code == 1 and run.status()["state"] == "failed"
    ended = trainer.go(run.path)
    assert ended.code == 0, ended.stderr
    assert run.config == trainer.config and run.status()["state"] == "done"
