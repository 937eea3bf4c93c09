"""What `train` promises beside the kills: signals, refusals, full disks, and what it writes."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import override, run_from_dict, run_to_dict
from tinylab.config.schema import RunConfig
from tinylab.dist.context import Context
from tinylab.errors import CheckpointError, RunStopped
from tinylab.runs.folder import Run
from tinylab.runs.manifest import verify_folder
from tinylab.runs.metrics import UNITS
from tinylab.training import loop
from tinylab.training.hooks import Hook
from tinylab.training.opening import open_run

KILL = int(signal.SIGKILL)


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder)
    return Run(folder)


def test_each_step_has_one_line_with_every_metric(reference: Run, tiny_config: RunConfig):
    records = reference.metric_records()
    assert [r["step"] for r in records] == list(range(1, 25))
    assert [r["tokens"] for r in records] == [256 * s for s in range(1, 25)]
    measured = {r["step"] for r in records if "validation_loss" in r}
    assert measured == {1, 4, 8, 12, 16, 20, 24} == {r["step"] for r in records if "bits_per_byte" in r}
    assert set().union(*records) == set(UNITS)
    assert all(len(r["data_hash"]) == 16 and int(r["data_hash"], 16) for r in records)
    assert [r["stage"] for r in records] == ["basic"] * 12 + ["cooldown"] * 12
    assert all(r["mfu"] is None for r in records), "the peak of a CPU is unknown"
    assert records[-1]["validation_loss"] < records[0]["validation_loss"] - 0.5


def test_checkpoints_lie_where_the_plan_says_and_hold(reference: Run):
    assert [int(p.name[5:]) for p in reference.checkpoints()] == [1, 2, 4, 5, 10, 12, 15, 20, 24]
    for folder in reference.checkpoints():
        assert verify_folder(folder) == []
        names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
        assert {"trainer/optimizer.safetensors", "trainer/rng.safetensors", "trainer/trainer.json"} <= names
        assert all(not n.endswith((".pt", ".bin", ".pth", ".pkl")) for n in names)
    record = json.loads((reference.checkpoints()[-1] / "trainer" / "trainer.json").read_text())
    assert (record["step"], record["tokens"], record["stage"], record["world_size"]) == (24, 6144, "cooldown", 1)
    assert record["threads"] == 1 and record["hours"] > 0 and len(record["data_fingerprint"]) == 64


def test_the_journal_tells_the_story_in_order(reference: Run):
    journal = reference.journal()
    assert [line["event"] for line in journal[:3]] == ["started", "stage", "committed"]
    assert [(x["stage"], x["step"]) for x in journal if x["event"] == "stage"] == [("basic", 0), ("cooldown", 12)]
    assert [x["step"] for x in journal if x["event"] == "committed"] == [1, 2, 4, 5, 10, 12, 15, 20, 24]
    assert journal[-1]["event"] == "done"
    provenance = json.loads(reference.provenance_path.read_text())
    assert provenance["packages"]["torch"] and provenance["machine"]["cores"] >= 1 and provenance["command"]


def test_a_finished_run_says_so_and_is_left_as_it_is(reference: Run, trainer: Any, tmp_path: Path):
    run = copy_of(reference, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and p.name not in ("status.json", "lock")}
    ended = trainer.go(run.path)
    assert ended.code == 0 and "is finished: step 24" in ended.stderr
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_a_checkpoint_and_repeats_no_step(
    number: int, code: int, trainer: Any, reference: Run, tmp_path: Path
):
    run = Run(tmp_path / "run")
    ended = trainer.go(run.path, signal_at=(7, int(number)))
    assert ended.code == code and "after step 7 of 24" in ended.stderr and signal.Signals(number).name in ended.stderr
    assert run.status()["state"] == "stopped" and run.status()["step"] == 7
    assert run.checkpoints()[-1].name == "step-00000007"
    stopped = run.journal()[-1]
    assert (stopped["event"], stopped["step"], stopped["tokens"]) == ("stopped", 7, 7 * 256)
    assert trainer.go(run.path).code == 0
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert (resumed["step"], resumed["repeated_steps"]) == (7, 0)
    losses = [(r["step"], r["loss"].hex(), r["data_hash"]) for r in run.metric_records()]
    assert losses == [(r["step"], r["loss"].hex(), r["data_hash"]) for r in reference.metric_records()]
    hours = json.loads((run.checkpoints()[-1] / "trainer" / "trainer.json").read_text())["hours"]
    assert hours == pytest.approx(sum(r["step_time_s"] for r in run.metric_records()) / 3600, rel=1e-3)


def test_signals_at_random_moments_never_lose_a_step(trainer: Any, reference: Run, tmp_path: Path):
    run = Run(tmp_path / "run")
    for after in (0.0, 0.02, 0.1, 0.3):
        ended = trainer.go(run.path, kill=(int(signal.SIGTERM), after))
        assert ended.code in (143, -signal.SIGTERM, 0), ended
    assert trainer.go(run.path).code == 0
    assert all(line.get("repeated_steps", 0) == 0 for line in run.journal())
    assert [r["loss"] for r in run.metric_records()] == [r["loss"] for r in reference.metric_records()]


def test_a_stop_file_stops_the_run_once(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / "stop").touch()
    assert trainer.go(run.path, failpoint="step.logged:3").code == -signal.SIGKILL, "an old stop file is no request"
    ended = trainer.go(run.path, stop_at=5)
    assert ended.code == 143 and "stop file" in ended.stderr
    assert not (run.path / "stop").exists()
    assert trainer.go(run.path).code == 0


def test_a_stop_file_that_comes_while_the_run_opens_is_obeyed(trainer: Any, tmp_path: Path, monkeypatch: Any):
    def opened_slowly(config: RunConfig, run: Run, context: Context) -> Path | None:
        (run.path / "stop").touch()
        return open_run(config, run, context)

    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    monkeypatch.setattr(loop, "open_run", opened_slowly)
    with pytest.raises(RunStopped, match=r"after step 0 of 24 \(stop file\)"):
        loop.train(trainer.config, Run(tmp_path / "run"), progress=False)


def test_what_a_kill_left_torn_is_repaired_before_anything_is_written(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, failpoint="step.logged:3").code == -signal.SIGKILL
    with open(run.journal_path, "a") as file:
        file.write('{"event": "comm')
    (run.path / ".status.json.123.tmp").touch()
    (run.path / ".mine.tmp").touch()
    ended = trainer.go(run.path, override(trainer.config, ["parallel.micro_batch=8"]))
    assert ended.code == 0, ended.stderr
    assert "changed" in [line["event"] for line in run.journal()]
    assert [p.name for p in run.path.glob(".*")] == [".mine.tmp"], "what is not ours stays"


def test_another_configuration_is_refused_with_its_keys(reference: Run, trainer: Any, tmp_path: Path):
    run = copy_of(reference, tmp_path / "run")
    other = override(trainer.config, ["optimizer.lr=0.5", "seed=12"])
    ended = trainer.go(run.path, other)
    assert ended.code == 2
    assert "optimizer.lr = 0.5 asked, 0.01 in the run" in ended.stderr and "seed = 12 asked" in ended.stderr
    assert run.status()["state"] == "done", "the refusal leaves the run alone"
    longer = trainer.go(run.path, override(trainer.config, ["stages.1.tokens=5120"]))
    assert longer.code == 2 and "cannot be made longer" in longer.stderr


def test_a_checkpoint_of_another_configuration_is_never_resumed(reference: Run, trainer: Any, tmp_path: Path):
    run = copy_of(reference, tmp_path / "run")
    run.config_path.unlink()
    ended = trainer.go(run.path, override(trainer.config, ["seed=12"]))
    assert ended.code == 1 and "written under another one" in ended.stderr


def test_another_layout_goes_on_with_a_note(trainer: Any, reference: Run, tmp_path: Path):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, failpoint="step.logged:12").code == -signal.SIGKILL
    ended = trainer.go(run.path, override(trainer.config, ["parallel.micro_batch=8"]))
    assert ended.code == 0, ended.stderr
    changed = next(line for line in run.journal() if line["event"] == "changed")
    assert changed["before"] == {"parallel.micro_batch": 4} and changed["after"] == {"parallel.micro_batch": 8}
    pairs = zip(run.metric_records(), reference.metric_records(), strict=True)
    for ours, theirs in pairs:
        assert ours["data_hash"] == theirs["data_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # fp32 sums in another order


def test_run_and_data_may_move_to_another_place(trainer: Any, reference: Run, tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    config = override(trainer.config, [f"data.path={old}/shards"])
    assert trainer.go(old / "run", config, signal_at=(6, KILL)).code == -signal.SIGKILL
    old.rename(new)
    run = Run(new / "run")
    ended = trainer.go(run.path, override(config, [f"data.path={new}/shards"]))
    assert ended.code == 0, ended.stderr
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert resumed["step"] == 5 and not old.exists()
    assert [r["loss"] for r in run.metric_records()] == [r["loss"] for r in reference.metric_records()]


def test_a_second_trainer_is_refused_and_the_first_lives(reference: Run, trainer: Any, tmp_path: Path):
    run = copy_of(reference, tmp_path / "run")
    with run.lock():
        ended = trainer.go(run.path)
    assert ended.code == 1 and "one trainer at a time" in ended.stderr and "pid" in ended.stderr


def test_a_run_whose_folder_was_replaced_writes_nothing_into_the_new_one(
    trainer: Any, tmp_path: Path, monkeypatch: Any
):
    """Removed and started anew while the old trainer was in a long step: both wrote into one metrics.jsonl."""

    class Replace(Hook):
        def step(self, record: dict[str, Any]) -> None:
            if record["step"] == 3:
                while [x["event"] for x in run.journal()].count("committed") < 2:
                    time.sleep(0.001)  # steps 1 and 2
                shutil.rmtree(run.path)
                run.create(trainer.config, {})
                (run.path / "lock").touch()

    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    run = Run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="must stay where it is while it is trained"):
        loop.train(trainer.config, run, progress=False, hooks=[Replace()])
    assert not any(p.exists() for p in (run.metrics_path, run.journal_path, run.status_path))


def test_other_data_under_the_same_name_are_refused(reference: Run, trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, signal_at=(6, KILL)).code == -signal.SIGKILL
    for record in run.path.glob("checkpoints/*/trainer/trainer.json"):
        text = record.read_text()
        fingerprint = json.loads(text)["data_fingerprint"]
        record.write_text(text.replace(fingerprint, "0" * 64))
        manifest = record.parents[1] / "manifest.json"
        manifest.write_text(_with_digest(manifest, record))
    ended = trainer.go(run.path)
    assert ended.code == 1 and "was trained on data with fingerprint 0000" in ended.stderr


def _with_digest(manifest: Path, record: Path) -> str:
    import hashlib

    content = json.loads(manifest.read_text())
    entry = content["files"]["trainer/trainer.json"]
    entry |= {"bytes": record.stat().st_size, "sha256": hashlib.sha256(record.read_bytes()).hexdigest()}
    return json.dumps(content)


def test_a_vocabulary_mismatch_is_refused_before_the_first_step(trainer: Any, tmp_path: Path, monkeypatch: Any):
    from tinylab.data.prepare import prepare
    from tinylab.errors import DataError
    from tinylab.training.opening import require_fitting_data

    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    shards = prepare(trainer.config.data)
    values = run_to_dict(trainer.config)
    values["model"]["vocab_size"] = values["data"]["vocab_size"] = 301
    with pytest.raises(DataError, match=r"model\.vocab_size = 301 entries; it has 300"):
        require_fitting_data(run_from_dict(values), shards, None)


def test_the_newest_checkpoint_is_replaced_by_the_newest_good_one(
    trainer: Any, reference: Run, assert_nothing_lost: Any, tmp_path: Path
):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, signal_at=(23, KILL)).code == -signal.SIGKILL
    weights = run.checkpoints_path / "step-00000020" / "model-00001-of-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    ended = trainer.go(run.path)
    assert ended.code == 0 and "step-00000020 is damaged" in ended.stderr and "SHA-256 differs" in ended.stderr
    assert (run.path / "quarantine" / "step-00000020").is_dir()
    quarantined = next(line for line in run.journal() if line["event"] == "quarantined")
    assert quarantined["step"] == 20
    resumed = next(line for line in run.journal() if line["event"] == "resumed")
    assert (resumed["step"], resumed["repeated_steps"]) == (15, 8)
    assert [r["loss"] for r in run.metric_records()] == [r["loss"] for r in reference.metric_records()]


def test_a_finished_run_whose_end_was_damaged_ends_once_more(trainer: Any, reference: Run, tmp_path: Path):
    run = copy_of(reference, tmp_path / "run")
    (run.checkpoints_path / "step-00000024" / "config.json").unlink()
    ended = trainer.go(run.path)
    assert ended.code == 0 and "step-00000024 is damaged" in ended.stderr
    assert run.status()["state"] == "done" and run.journal()[-1]["event"] == "done"
    assert [r["loss"] for r in run.metric_records()] == [r["loss"] for r in reference.metric_records()]


def test_a_run_without_any_good_checkpoint_is_explained(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, signal_at=(3, KILL)).code == -signal.SIGKILL
    for folder in run.checkpoints():
        (folder / "config.json").unlink()
    for _ in range(2):
        ended = trainer.go(run.path)
        assert ended.code == 1 and "at least one undamaged checkpoint" in ended.stderr
    assert len(list((run.path / "quarantine").iterdir())) == 2


def test_a_write_that_fails_names_the_path_and_loses_nothing(
    trainer: Any, reference: Run, assert_nothing_lost: Any, tmp_path: Path
):
    run = Run(tmp_path / "run")
    assert trainer.go(run.path, signal_at=(6, KILL)).code == -signal.SIGKILL
    kept = {p: p.read_bytes() for p in run.checkpoints_path.rglob("*") if p.is_file()}
    ended = trainer.go(run.path, file_bytes=60_000)
    assert ended.code == 1 and "cannot write" in ended.stderr and "step-" in ended.stderr, ended
    assert run.status()["state"] == "failed" and run.journal()[-1]["event"] == "failed"
    assert {p: p.read_bytes() for p in kept} == kept
    assert trainer.go(run.path).code == 0
    assert_nothing_lost(reference, run)


def test_a_folder_that_cannot_be_made_is_one_clear_message(trainer: Any, tmp_path: Path):
    (tmp_path / "file").touch()
    ended = trainer.go(tmp_path / "file" / "run")
    assert ended.code == 1 and "cannot write" in ended.stderr and str(tmp_path / "file" / "run") in ended.stderr


def test_a_validation_loss_that_is_not_finite_stops_the_run(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    wild = override(trainer.config, ["optimizer.lr=1e30", "optimizer.clip_norm=none", "schedule.warmup_tokens=0"])
    ended = trainer.go(run.path, wild)
    assert ended.code == 1 and "validation loss after step 1 must be finite; found nan" in ended.stderr
    assert run.status()["state"] == "failed"
    assert run.status()["step"] == len(run.metric_records())
