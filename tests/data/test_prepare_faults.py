"""Preparation: nothing half-done under a final name, one at a time, and one message for what cannot be prepared."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.config.schema import Data, Source
from tinylab.data import prepare as module
from tinylab.data.prepare import data_path, prepare
from tinylab.data.shards.reader import open_shards
from tinylab.errors import DataError

from .paragraphs import VOCAB, quiet


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def run_prepare(data: Data, **environment: str) -> subprocess.Popen[str]:
    program = (
        "import ast, sys; from tinylab.config.schema import Data, Source; from tinylab.data.prepare import prepare\n"
        f"shards = prepare({data!r}); print(shards.fingerprint)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "point", ["prepare.read:2", "prepare.tokenizer", "prepare.encoded:3", "prepare.filled", "commit.manifest_written"]
)
def test_a_kill_leaves_nothing_under_the_final_name_and_the_same_command_completes(data, tmp_path, point):
    wanted = prepare(data, path=tmp_path / "undisturbed", progress=quiet).fingerprint
    killed = run_prepare(data, TINYLAB_FAILPOINT=point)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not data_path(data).exists()
    assert prepare(data, progress=quiet).fingerprint == wanted
    assert leftovers(data_path(data).parent) == []


def test_two_preparations_at_once_make_one_and_both_get_it(data):
    both = [run_prepare(data) for _ in range(2)]
    (out, err), (other_out, other_err) = (p.communicate(timeout=120) for p in both)
    assert [p.returncode for p in both] == [0, 0] and out == other_out != ""
    assert sorted(("waiting for it" in e, "MB of disk needed" in e) for e in (err, other_err)) == [
        (False, True),
        (True, False),
    ]
    assert leftovers(data_path(data).parent) == []


def test_a_waiting_preparation_outlives_its_predecessors_lock(data):
    """The lock's file goes with its holder; whoever waited for it must not mistake the old one for the new one."""
    target = data_path(data)
    with module._locked(target, quiet):
        waiting = run_prepare(data)
        deadline = time.monotonic() + 60
        assert waiting.stderr is not None
        while "waiting" not in waiting.stderr.readline():
            assert time.monotonic() < deadline
    waiting.communicate(timeout=120)
    assert waiting.returncode == 0 and target.exists() and leftovers(target.parent) == []


def test_a_lock_that_was_waited_for_holds(data):
    target, order = data_path(data), []

    def wait_and_hold() -> None:
        with module._locked(target, quiet):
            order.append("second")
            released.wait(30)

    released = threading.Event()
    second = threading.Thread(target=wait_and_hold)
    with module._locked(target, quiet):
        second.start()
        time.sleep(0.2)
        order.append("first")
    while order != ["first", "second"]:
        time.sleep(0.01)
    lock = target.with_name(f".lock-{target.name}")
    with open(lock) as file, pytest.raises(BlockingIOError):  # not the file that the first one took away
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    released.set()
    second.join()
    assert not lock.exists()


def test_a_failed_preparation_leaves_nothing(data, monkeypatch):
    monkeypatch.setattr("tinylab.data.build._check_disk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(data, progress=quiet)
    assert list(data_path(data).parent.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(data):
    program = (
        "import resource, sys; from tinylab.config.schema import Data, Source\n"
        "from tinylab.data.prepare import prepare; from tinylab.errors import DataError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        f"try: prepare({data!r})\nexcept DataError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "cannot write" in run.stdout and "bytes free" in run.stdout and "repeat the same command" in run.stdout
    assert list(data_path(data).parent.iterdir()) == []


def test_too_little_room_is_refused_before_anything_is_encoded(data, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(DataError, match=r"must have room for the shards, about [\d,]+ bytes; found 100 free"):
        prepare(data, progress=quiet)


def test_a_missing_empty_or_unreadable_corpus_names_its_source(data, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "cut.jsonl").write_text('{"text": "good"}\n{"text": "cu')
    copy = Source(name="copy", corpus=data.sources[0].corpus)
    for corpus, message in (
        (f"files:{tmp_path}/none/*.txt", r"source bad: files:.*none/\*\.txt must match at least one file"),
        (f"files:{tmp_path}/empty.txt", r"source bad \(files:.*empty\.txt\) must have at least one document"),
        (f"files:{tmp_path}/cut.jsonl", r"source bad: .*cut\.jsonl, line 2 must be JSON"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(replace(data, sources=(data.sources[0], Source(name="bad", corpus=corpus))), progress=quiet)
    with pytest.raises(DataError, match=r"source copy .* that no other source has; found .*'duplicates': 122"):
        prepare(replace(data, sources=(data.sources[0], copy)), progress=quiet)


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(data, tokenizer_folder):
    said: list[str] = []
    wrong = replace(data, tokenizer=str(tokenizer_folder), vocab_size=600)
    with pytest.raises(DataError, match=rf"data\.vocab_size \(600\) must equal .*{VOCAB}; set .* to {VOCAB}"):
        prepare(wrong, progress=said.append)
    with pytest.raises(DataError, match=r"found nothing at nowhere"):
        prepare(replace(data, tokenizer="nowhere"), progress=said.append)
    assert said == [], "the corpus, which may take hours, is not read first"


def test_a_boundary_that_the_tokenizer_lacks_is_refused(data, tmp_path):
    import tokenizers

    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(i): i - 32 for i in range(32, 132)}, merges=[]))
    bare.save(str(tmp_path / "bare.json"))
    bare_data = replace(data, tokenizer=str(tmp_path / "bare.json"), vocab_size=100)
    with pytest.raises(DataError, match=r"data\.boundary = 'eos' must use special tokens that the tokenizer has"):
        prepare(bare_data, progress=quiet)


def test_other_data_and_other_files_in_the_folder_are_left_alone(data, tmp_path):
    target = tmp_path / "shards"
    prepare(data, path=target, progress=quiet)
    with pytest.raises(DataError, match=r"data\.boundary is 'eos' there, 'bos' here"):
        prepare(replace(data, boundary="bos"), path=target, progress=quiet)
    assert open_shards(target).manifest["tokenizer"]["boundary"] == "eos"
    with pytest.raises(DataError, match=r"must be empty or hold prepared data; found other files"):
        prepare(data, path=tmp_path / "a", progress=quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file"):
        prepare(data, path=tmp_path / "file" / "below", progress=quiet)


def test_an_empty_folder_is_taken(data, tmp_path):
    (tmp_path / "target").mkdir()
    assert prepare(data, path=tmp_path / "target", progress=quiet).path == tmp_path / "target"
