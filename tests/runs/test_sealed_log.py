"""Sealed lines: whatever is done to a log, it is noticed by line, and what the copy holds is put back."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.errors import CheckpointError
from tinylab.runs.journal import JournalLog
from tinylab.runs.metrics import MetricsLog
from tinylab.runs.sealed_log import Seal, stored_seals


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    add(log, 1, 21)
    return log


def add(log: MetricsLog, first: int, behind: int) -> None:
    for step in range(first, behind):
        log.append({"step": step, "loss": 3 + 1 / step, "stage": "basic"})


def sealed(log: MetricsLog, name: str = "step-00000020") -> Seal:
    return Seal(checkpoint=name, **log.seal())


def lines_of(log: MetricsLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def altered(lines: list[bytes]) -> list[bytes]:
    return [*lines[:7], lines[7].replace(b"3.1", b"3.2"), *lines[8:]]


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a changed digit": altered,
    "a dropped line": lambda lines: lines[:7] + lines[8:],
    "a doubled line": lambda lines: [*lines[:8], lines[7], *lines[8:]],
    "two lines swapped": lambda lines: [*lines[:7], lines[8], lines[7], *lines[9:]],
    "the first lines gone": lambda lines: lines[7:],
    "the last lines gone": lambda lines: lines[:7],
    "a broken line": lambda lines: [*lines[:7], b"{broken\n", *lines[8:]],
    "a misspelt key": lambda lines: [*lines[:7], lines[7].replace(b"loss", b"los"), *lines[8:]],
    "an inserted line": lambda lines: [*lines[:7], b'{"step": 99}\n', *lines[7:]],
    "no newline between two": lambda lines: [*lines[:7], lines[7][:-1], *lines[8:]],
    "nothing left": lambda lines: [],
    "another file": lambda lines: [b"\x00\xff" * 100],
}


def test_a_seal_is_the_count_and_the_hash_of_the_lines_however_often_it_was_taken(log: MetricsLog):
    for first in (21, 22, 25):
        log.seal()
        add(log, first, first + 1)
    data = log.path.read_bytes()
    assert log.seal() == {"lines": 23, "sha256": hashlib.sha256(data).hexdigest()}
    assert log.copy_path.read_bytes() == data


def test_a_seal_reads_only_what_came_since_the_last_one(log: MetricsLog, monkeypatch: pytest.MonkeyPatch):
    from tinylab.runs import sealed_log

    log.seal()
    add(log, 21, 24)
    seen = []
    real = sealed_log.complete_lines
    monkeypatch.setattr(sealed_log, "complete_lines", lambda *a: (seen.append(x) or x for x in real(*a)))
    log.seal()
    assert len(seen) == 3


def test_a_torn_last_line_is_not_sealed(log: MetricsLog):
    with open(log.path, "a") as file:
        file.write('{"step": 21, "lo')
    assert log.seal()["lines"] == 20
    assert log.repair([sealed(log)]) == []
    assert len(lines_of(log)) == 20


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_by_line_and_the_copy_is_put_back(log: MetricsLog, damage: str, tail: int):
    seal = sealed(log)
    whole = log.path.read_bytes()
    lines = DAMAGE[damage](lines_of(log))
    log.path.write_bytes(b"".join(lines))
    add(log, 21, 21 + tail)
    again = MetricsLog(log.path)
    (found,) = again.damage([seal])
    assert str(log.path) in found and (re.search("line [89]", found) or damage not in list(DAMAGE)[:4])
    (note,) = again.repair([seal])
    assert note.startswith(found) and f"restored from {log.copy_path}; the damaged file is now" in note
    kept = log.path.read_bytes()
    assert kept.startswith(whole)
    assert damage in ("another file", "nothing left") or len(lines_of(again)) == 20 + tail
    assert (log.path.parent / "quarantine" / "metrics.jsonl").read_bytes().startswith(b"".join(lines)[:-1])
    assert again.damage([seal]) == [] and again.repair([seal]) == [] and again.records()[7]["step"] == 8
    assert again.seal()["sha256"] == hashlib.sha256(kept).hexdigest()


def test_damage_of_the_copy_alone_is_named_with_the_remedy(log: MetricsLog):
    seal = sealed(log)
    log.copy_path.write_bytes(log.copy_path.read_bytes()[:-9])
    again = MetricsLog(log.path)
    (found,) = again.damage([seal])
    assert found == f"{log.copy_path} is not the copy of the sealed lines: remove it, the next commit makes it again"
    log.copy_path.unlink()
    assert again.repair([seal]) == []
    again.seal()
    assert again.damage([seal]) == [] and log.copy_path.read_bytes() == log.path.read_bytes()


def test_a_missing_file_is_put_back(log: MetricsLog):
    seal, whole = sealed(log), log.path.read_bytes()
    log.path.unlink()
    (note,) = MetricsLog(log.path).repair([seal])
    assert "all 20 lines that step-00000020 sealed are missing; restored from" in note
    assert log.path.read_bytes() == whole


@pytest.mark.parametrize("damage", ["a changed digit", "a dropped line", "a broken line", "a misspelt key"])
def test_without_a_copy_the_seals_of_older_checkpoints_tell_where(log: MetricsLog, damage: str):
    log.path.unlink()
    seals = []
    for step in (0, 5, 10, 15):
        add(log, step + 1, step + 6)
        seals.append(sealed(log, f"step-{step + 5:08d}"))
    log.path.write_bytes(b"".join(DAMAGE[damage](lines_of(log))))
    log.copy_path.write_bytes(b"nothing\n")
    again = MetricsLog(log.path)
    notes = again.repair(seals)
    assert "lines 6 to 10 are not those that step-00000010 sealed; they cannot be restored" in notes[0]
    assert len(notes) == 1 + (damage in ("a broken line", "a misspelt key"))
    steps = [record["step"] for record in again.records()]
    assert steps == [s for s in range(1, 21) if s != 8 or damage == "a changed digit"]
    seal = Seal(checkpoint="step-00000020", **again.seal())
    assert MetricsLog(log.path).repair([*seals[:-1], seal]) == [], "the next checkpoint seals what is there"
    assert log.copy_path.read_bytes() == log.path.read_bytes()


def test_a_log_that_was_never_sealed_loses_only_its_damaged_lines(log: MetricsLog):
    lines = lines_of(log)
    log.path.write_bytes(b"".join([*lines[:7], b"[1]\n", lines[8], lines[8], *lines[9:]]))
    with pytest.raises(CheckpointError, match=r"line 8: must be a JSON object; found b'\[1\]'. To repair it: tinylab"):
        log.records()
    (note,) = log.repair([])
    assert "2 damaged lines left out, the first, 8: must be a JSON object; found b'[1]'" in note
    assert log.path.read_bytes() == b"".join(lines[:7] + lines[8:])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"step": 21, "los": 3}', "unknown key 'los'; did you mean loss"),
        ('{"loss": 3}', "step must be a whole number above 20; found None"),
        ('{"step": 20}', "step must be a whole number above 20; found 20"),
        ('{"step": 21.5}', r"step must be a whole number above 20; found 21\.5"),
        ('{"step": 21, "loss": "3"}', "loss must be a number; found '3'"),
        ('{"step": 21, "stage": 3}', "stage must be text; found '3'"),
    ],
)
def test_a_line_of_metrics_that_is_none_is_a_clear_error(log: MetricsLog, line: str, message: str):
    with open(log.path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=rf"metrics\.jsonl, line 21: {message}"):
        log.records()


@pytest.mark.parametrize("line", ['{"time": 1}', '{"event": "done"}', '{"event": 3, "time": 1}'])
def test_a_line_of_the_journal_needs_event_and_time(tmp_path: Path, line: str):
    journal = JournalLog(tmp_path / "journal.jsonl")
    journal.write("started")
    with open(journal.path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl, line 2: (event|time) must be "):
        journal.records()


def test_a_journal_keeps_the_events_after_the_seal(tmp_path: Path):
    journal = JournalLog(tmp_path / "journal.jsonl")
    for step in range(5):
        journal.write("committed", step=step)
    seal = Seal(checkpoint="step-00000004", **journal.seal())
    journal.write("committed", step=4)
    journal.write("stopped", step=4)
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole.replace(b'"step": 2', b'"step": 3'))
    (note,) = JournalLog(journal.path).repair([seal])
    assert "1 of 5 sealed lines missing or altered, the first at line 3" in note
    assert journal.path.read_bytes() == whole


def test_a_log_removed_while_it_grows_is_restored_at_the_next_seal(log: MetricsLog, capsys: pytest.CaptureFixture[str]):
    log.seal()
    log.path.unlink()
    add(log, 21, 23)
    assert log.seal()["lines"] == 22
    assert "restored from" in capsys.readouterr().err
    assert [record["step"] for record in log.records()] == list(range(1, 23))


def test_lines_cut_below_the_seal_are_sealed_anew(log: MetricsLog):
    log.seal()
    assert [record["step"] for record in log.cut_after(12)] == list(range(13, 21))
    add(log, 13, 18)
    assert log.seal() == {"lines": 17, "sha256": hashlib.sha256(log.path.read_bytes()).hexdigest()}


def test_a_seal_is_believed_only_from_a_trainer_file_that_its_manifest_knows(tmp_path: Path):
    text = json.dumps({"metrics": {"lines": 3, "sha256": "ab"}})
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    folders = [tmp_path / f"step-0000000{i}" for i in range(3)]
    for folder in folders:
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / "trainer.json").write_text(text)
        (folder / "manifest.json").write_text(json.dumps({"files": {"trainer/trainer.json": entry}}))
    (folders[1] / "trainer" / "trainer.json").write_text(text.replace("3", "4"))
    (folders[2] / "manifest.json").write_text("[" * 100_000)
    assert stored_seals(folders, "metrics") == [Seal(checkpoint="step-00000000", lines=3, sha256="ab")]
    assert stored_seals(folders, "journal") == []


@pytest.mark.parametrize("seed", range(40))
def test_no_random_damage_passes_in_silence(tmp_path: Path, seed: int):
    generator = random.Random(seed)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    add(log, 1, 30)
    seal, whole = sealed(log), log.path.read_bytes()
    data = bytearray(whole)
    start = generator.randrange(len(data))
    kind = generator.choice(["bit", "cut", "zero", "drop"])
    if kind == "bit":
        data[start] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del data[start:]
    elif kind == "zero":
        data[start : start + 100] = bytes(len(data[start : start + 100]))
    else:
        del data[start : start + generator.randint(1, 200)]
    log.path.write_bytes(data)
    again = MetricsLog(log.path)
    assert len(again.damage([seal])) == 1
    assert len(again.repair([replace(seal)])) == 1
    assert log.path.read_bytes() == whole
