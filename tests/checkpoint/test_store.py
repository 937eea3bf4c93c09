"""Checkpoints on disk: when, which one counts, what happens to damaged and surplus ones."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tinylab.checkpoint import retention, store
from tinylab.checkpoint.retention import prune, saves_at
from tinylab.checkpoint.snapshot import Snapshot
from tinylab.checkpoint.store import commit_checkpoint, latest_good, load_rng, open_optimizer, read_record
from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Saving, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.errors import CheckpointError
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run

MODEL = Model(vocab_size=20, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=16, seq_len=8)
CONFIG = RunConfig(
    model=MODEL,
    data=Data(sources=(Source(name="a", corpus="files:a.txt"),), vocab_size=20),
    stages=(Stage(name="one", tokens=30 * 8, batch_tokens=8), Stage(name="two", tokens=10 * 8, batch_tokens=8)),
    schedule=Schedule(warmup_tokens=8),
    saving=Saving(every_tokens=10 * 8),
)


def snapshot(step: int) -> Snapshot:
    model = Llama(MODEL)
    model.init_weights(step)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    moments = {f"{n}.exp_avg": w + step for n, w in weights.items()}
    record = {"step": step, "tokens": 8 * step}
    rng = {"cpu.0": torch.arange(256).to(torch.uint8) * step}
    return Snapshot(weights=weights, optimizer=moments, rng=rng, record=record)


@pytest.fixture
def shards(tmp_path: Path) -> Any:
    """What a save needs of the data: a tokenizer folder and its ids."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return SimpleNamespace(tokenizer_path=tmp_path / "tokenizer", manifest={"tokenizer": {"bos_id": 1, "eos_id": 2}})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create(CONFIG, {})
    return run


def save(run: Run, shards: Any, *steps: int) -> None:
    for step in steps:
        commit_checkpoint(run, snapshot(step), MODEL, shards)


def test_saves_are_at_early_steps_crossings_and_stage_ends():
    assert [s for s in range(1, 41) if saves_at(CONFIG, s)] == [1, 2, 4, 8, 10, 20, 30, 40]
    plain = replace(CONFIG, saving=Saving(every_tokens=12 * 8, early=False))
    assert [s for s in range(1, 41) if saves_at(plain, s)] == [12, 24, 30, 36, 40]
    rare = replace(CONFIG, saving=Saving(every_tokens=10**9))
    assert [s for s in range(1, 41) if saves_at(rare, s)] == [1, 2, 4, 8, 16, 30, 32, 40]


def test_crossings_are_counted_in_tokens_not_in_steps():
    uneven = replace(CONFIG, saving=Saving(every_tokens=20, early=False))
    assert [s for s in range(1, 12) if saves_at(uneven, s)] == [3, 5, 8, 10]


def test_a_checkpoint_gives_back_what_was_saved_bit_for_bit(run: Run, shards: Any):
    save(run, shards, 10)
    folder, notes = latest_good(run)
    assert folder == run.checkpoints_path / "step-00000010" and notes == []
    record, rng, saved = read_record(folder), load_rng(folder), snapshot(10)
    with open_optimizer(folder) as stored:
        moments = {name: tensor[:] for name, tensor in stored.items()}
    assert record["step"] == 10 and record["format_version"] == 1
    assert moments.keys() == saved.optimizer.keys()
    assert all(torch.equal(moments[n], t) for n, t in saved.optimizer.items())
    assert torch.equal(rng["cpu.0"], saved.rng["cpu.0"])


def test_steps_are_compared_as_integers(run: Run, shards: Any):
    """Names sort as text otherwise: jzhang38/TinyLlama resumed from iter-960000 with iter-1240000 on disk."""
    save(run, shards, 99_999_999, 100_000_000, 960_000, 1_040_000)
    folder, _ = latest_good(run)
    assert folder and folder.name == "step-100000000"
    assert [int(p.name[5:]) for p in run.checkpoints()] == [960_000, 1_040_000, 99_999_999, 100_000_000]


def test_stray_folders_never_count(run: Run, shards: Any):
    save(run, shards, 4)
    for name in ("step-00000008.bak", "step-8", "step-00000009x", ".tmp-step-00000010", "old"):
        shutil.copytree(run.checkpoints_path / "step-00000004", run.checkpoints_path / name)
    folder, notes = latest_good(run)
    assert folder and folder.name == "step-00000004" and notes == []
    assert not (run.checkpoints_path / ".tmp-step-00000010").exists(), "a leftover of a killed save is removed"
    assert (run.checkpoints_path / "step-00000008.bak").exists(), "what is not ours stays"


def damage(folder: Path, generator: random.Random) -> str:
    """Damage one file of a checkpoint in one of the ways that storage knows; says how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = generator.choice(files)
    data = bytearray(path.read_bytes())
    kind = generator.choice(["truncate", "bit", "page", "missing", "extra", "swap"])
    if kind == "truncate":
        path.write_bytes(data[: generator.randrange(len(data))])
    elif kind == "bit":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
    elif kind == "page":
        start = generator.randrange(len(data))
        part = data[start : start + 4096]
        path.write_bytes(data[:start] + bytes(b ^ 0xFF for b in part) + data[start + 4096 :])
    elif kind == "missing":
        path.unlink()
    elif kind == "extra":
        (folder / "trainer" / "extra.safetensors").write_bytes(b"\0" * 8)
    else:
        other = generator.choice([p for p in files if p != path])
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    return f"{kind} {path.name}"


@pytest.mark.goal("R8")
@pytest.mark.parametrize("count", [60, pytest.param(700, marks=pytest.mark.stress)])
def test_every_damage_is_seen_and_the_newest_good_one_is_used(
    count: int, run: Run, shards: Any, tmp_path: Path, record_property: Any
):
    save(run, shards, 10, 20)
    whole = tmp_path / "whole"
    shutil.copytree(run.checkpoints_path / "step-00000020", whole)
    for seed in range(count):
        newest = run.checkpoints_path / "step-00000020"
        if not newest.exists():
            shutil.copytree(whole, newest)
        how = damage(newest, random.Random(seed))
        if _same(newest, whole):
            continue
        folder, notes = latest_good(run)
        assert folder and folder.name == "step-00000010", f"seed {seed}: {how} was not seen"
        assert len(notes) == 1 and "step-00000020 is damaged" in notes[0] and "quarantine" in notes[0]
    assert run.journal()[-1]["event"] == "quarantined"
    record_property("trials", count)


def _same(a: Path, b: Path) -> bool:
    files = [{p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()} for r in (a, b)]
    return files[0] == files[1]


def test_files_of_two_steps_mixed_are_seen(run: Run, shards: Any):
    save(run, shards, 10, 20)
    old, new = (run.checkpoints_path / f"step-000000{s}0" for s in (1, 2))
    shutil.copy(old / "trainer" / "optimizer.safetensors", new / "trainer" / "optimizer.safetensors")
    folder, notes = latest_good(run)
    assert folder == old and "optimizer.safetensors: SHA-256 differs" in notes[0]


def test_a_whole_checkpoint_under_another_steps_name_is_seen(run: Run, shards: Any):
    save(run, shards, 10)
    shutil.copytree(run.checkpoints_path / "step-00000010", run.checkpoints_path / "step-00000099")
    folder, notes = latest_good(run)
    assert folder and folder.name == "step-00000010" and "step 10 in a folder of another" in notes[0]


def test_no_checkpoint_yet_is_no_error_but_a_lost_one_is(run: Run, shards: Any):
    assert latest_good(run) == (None, [])
    save(run, shards, 1)
    shutil.rmtree(run.checkpoints_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"at least one undamaged.*is empty although the journal names"):
        latest_good(run)


def test_a_folder_renamed_before_its_journal_line_gets_the_line(run: Run, shards: Any):
    save(run, shards, 1, 2)
    lines = run.journal_path.read_bytes().splitlines(keepends=True)
    run.journal_path.write_bytes(b"".join(lines[:-1]))
    folder, _ = latest_good(run)
    assert folder and folder.name == "step-00000002"
    assert [(x["step"], x.get("recovered", False)) for x in run.journal()] == [(1, False), (2, True)]
    latest_good(run)
    assert len(run.journal()) == 2, "once is enough"


def test_retention_keeps_the_newest_regular_and_every_permanent_checkpoint(run: Run, shards: Any):
    config = replace(CONFIG, saving=replace(CONFIG.saving, every_tokens=5 * 8, keep=2))
    for step in (1, 2, 4, 5, 10, 15, 20, 25):
        save(run, shards, step)
        prune(run, config)
    assert [int(p.name[5:]) for p in run.checkpoints()] == [1, 2, 4, 20, 25]
    save(run, shards, 30, 35, 40)
    assert prune(run, config) == [20]
    assert [int(p.name[5:]) for p in run.checkpoints()] == [1, 2, 4, 25, 30, 35, 40]


def test_nothing_is_removed_behind_a_checkpoint_that_does_not_hold(run: Run, shards: Any):
    config = replace(CONFIG, saving=replace(CONFIG.saving, early=False, keep=1))
    save(run, shards, 10, 20)
    (run.checkpoints_path / "step-00000020" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"right after its commit.*No older checkpoint was removed"):
        prune(run, config)
    assert len(run.checkpoints()) == 2


def test_a_damaged_checkpoint_does_not_count_towards_those_that_are_kept(run: Run, shards: Any):
    config = replace(CONFIG, saving=replace(CONFIG.saving, every_tokens=8, early=False, keep=2))
    save(run, shards, 5, 6, 7, 8)
    (run.checkpoints_path / "step-00000007" / "config.json").write_text("{}")
    assert prune(run, config) == [5], "8 and 6 hold; 7 is no reason to give 6 up"
    assert [int(p.name[5:]) for p in run.checkpoints()] == [6, 7, 8]
    save(run, shards, 9)
    assert prune(run, config) == [6, 7]


def test_nothing_is_removed_before_enough_checkpoints_hold(run: Run, shards: Any):
    config = replace(CONFIG, saving=replace(CONFIG.saving, every_tokens=8, early=False, keep=2))
    save(run, shards, 5, 6, 7)
    for step in (5, 6):
        (run.checkpoints_path / f"step-0000000{step}" / "config.json").write_text("{}")
    assert prune(run, config) == [] and len(run.checkpoints()) == 3


def test_what_was_verified_is_not_read_again_unless_its_manifest_changed(
    run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    monkeypatch.setattr(retention, "problems_of", lambda folder: read.append(folder.name[-2:]) or [])
    config = replace(CONFIG, saving=replace(CONFIG.saving, every_tokens=8, early=False, keep=2))
    verified: dict[Path, str] = {}
    for step in range(11, 16):
        save(run, shards, step)
        prune(run, config, verified)
    assert read == ["13", "12", "14", "15"]
    manifest = run.checkpoints()[-1] / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    save(run, shards, 16)
    prune(run, config, verified)
    assert read[4:] == ["16", "15"]


def test_a_save_without_room_names_bytes_needed_and_free_before_it_writes(
    run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"step-00000001: about \d+ bytes needed, 1000 bytes free; make room"):
        save(run, shards, 1)
    assert list(run.checkpoints_path.iterdir()) == []


def test_the_room_asked_for_holds_every_file(run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch):
    (shards.tokenizer_path / "tokenizer.model").write_bytes(b"x" * 300_000)
    save(run, shards, 1)
    size = sum(p.stat().st_size for p in run.checkpoints()[0].rglob("*") if p.is_file())
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    with pytest.raises(CheckpointError, match="make room"):
        save(run, shards, 2)


def test_a_checkpoint_is_never_replaced(run: Run, shards: Any):
    save(run, shards, 1)
    before = (run.checkpoints_path / "step-00000001" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="must not exist before it is committed"):
        save(run, shards, 1)
    assert (run.checkpoints_path / "step-00000001" / "manifest.json").read_bytes() == before
    assert [p.name for p in run.checkpoints_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_may_not_be_read_stays_where_it_is(run: Run, shards: Any, monkeypatch: Any):
    save(run, shards, 10, 20)
    real = os.open

    def forbidden(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("step-00000020/manifest.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(CheckpointError, match=r"cannot read .*step-00000020: Permission denied; check the path"):
        latest_good(run)
    assert len(run.checkpoints()) == 2 and not (run.path / "quarantine").exists()


def test_a_damaged_checkpoint_is_set_aside_from_another_disk_too(run: Run, shards: Any, monkeypatch: Any):
    save(run, shards, 10, 20)
    (run.checkpoints_path / "step-00000020" / "config.json").write_text("{}")

    def across_disks(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", across_disks)
    folder, _ = latest_good(run)
    assert folder == run.checkpoints_path / "step-00000010"
    assert (run.path / "quarantine" / "step-00000020" / "config.json").read_text() == "{}"
    assert len(run.checkpoints()) == 1


def test_another_format_version_is_refused(run: Run, shards: Any):
    saved = snapshot(1)
    saved.record["format_version"] = 2
    commit_checkpoint(run, saved, MODEL, shards)
    with pytest.raises(CheckpointError, match=r"format_version 1; found 2\. Resume with the tinylab that wrote it"):
        latest_good(run)
    assert run.checkpoints(), "it is not damaged, only newer: it stays"


def test_a_record_without_a_field_is_one_message(run: Run, shards: Any):
    saved = snapshot(10)
    path = commit_checkpoint(run, saved, MODEL, shards) / "trainer" / "trainer.json"
    record = json.loads(path.read_text())
    del record["tokens"], record["step"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"trainer\.json must have step, tokens; found none"):
        read_record(path.parents[1])
