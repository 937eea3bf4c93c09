"""Preparation: every token accounted for, one identity from the same texts, nothing half-done under a final name."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinylab.config.schema import Data, Source
from tinylab.data import prepare as module
from tinylab.data.audit import audit_shards
from tinylab.data.prepare import data_path, prepare
from tinylab.data.shards import ShardSet, open_shards
from tinylab.data.tokenizer import Tokenizer, load_tokenizer_file, train_tokenizer
from tinylab.errors import DataError
from tinylab.runs.folder import home

VOCAB = 500
LIBRARY = Path(json.__file__).parent.parent
SOURCE = (LIBRARY / "argparse.py").read_text(encoding="utf-8")
PARAGRAPHS = [f"{i}: {p}" for i, p in enumerate((SOURCE * 2).split("\n\n")) if len(p) > 40]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[str]]:
    """Two sources: `a` of text files, `b` of JSON lines, with duplicates in and between them, and empty ones."""
    a = [*PARAGRAPHS[:120], PARAGRAPHS[3], PARAGRAPHS[7], "", " \n"]
    b = [*PARAGRAPHS[100:260], PARAGRAPHS[200]]
    (tmp_path / "a").mkdir()
    for i, text in enumerate(a):
        (tmp_path / "a" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in b), encoding="utf-8")
    return {"a": a, "b": b}


@pytest.fixture
def data(tmp_path: Path, texts) -> Data:
    sources = (
        Source(name="a", corpus=f"files:{tmp_path}/a/*.txt"),
        Source(name="b", corpus=f"files:{tmp_path}/b.jsonl"),
    )
    return Data(sources=sources, vocab_size=VOCAB, validation_fraction=0.05)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(PARAGRAPHS, VOCAB).save(folder)
    return folder


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def stored_texts(shards: ShardSet, split: str, name: str) -> list[str]:
    """The documents of a source, decoded from their ids, each checked against its digest."""
    tokenizer, stream, found = load_tokenizer_file(shards.tokenizer_path), shards.stream(split, name), []
    for i in range(stream.n_documents):
        found.append(tokenizer.decode(stream.document_text_ids(i)))
        assert hashlib.sha256(found[-1].encode()).hexdigest() == stream.document_line(i)["sha256"]
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_every_document_is_stored_exactly_once_and_decodes_to_its_text(data, texts):
    shards = prepare(data, progress=quiet)
    found = Counter(
        t for name in ("a", "b") for split in ("train", "validation") for t in stored_texts(shards, split, name)
    )
    expected = {t for t in [*texts["a"], *texts["b"]] if t.strip()}
    assert found == dict.fromkeys(expected, 1)
    counts = shards.manifest["report"]["sources"]
    assert counts["a"] == {"read": 124, "empty": 2, "duplicates": 2, "repaired": 0, "kept": 120, "skipped": {}}
    assert counts["b"] == {"read": 161, "empty": 0, "duplicates": 21, "repaired": 0, "kept": 140, "skipped": {}}


def test_tokens_encoded_plus_boundaries_are_the_tokens_stored(data):
    for boundary, per_document in (("eos", 1), ("bos_eos", 2)):
        shards = prepare(replace(data, boundary=boundary), progress=quiet)
        tokenizer = load_tokenizer_file(shards.tokenizer_path)
        kept = [t for n in ("a", "b") for s in ("train", "validation") for t in stored_texts(shards, s, n)]
        encoded = sum(len(tokenizer.encode(t)) for t in kept)
        files = sum(p.stat().st_size // 2 for p in shards.path.rglob("*.bin"))
        assert shards.manifest["report"]["conservation"] == {
            "tokens_encoded": encoded,
            "boundary_tokens": per_document * len(kept),
            "tokens_stored": files,
        }
        assert encoded + per_document * len(kept) == files


@pytest.mark.parametrize("boundary", ["eos", "bos", "bos_eos"])
def test_no_padding_is_stored_and_an_epoch_delivers_all_but_a_reported_rest(data, tokenizer_folder, boundary):
    """TinyLlama filled chunks with BOS (#83), then dropped them (#85)."""
    shards = prepare(replace(data, boundary=boundary, tokenizer=str(tokenizer_folder)), progress=quiet)
    seq_len, window = 64, 32
    report = audit_shards(shards, max_run=window, seq_len=seq_len)
    assert report["problems"] == []
    per_document = {"eos": [0, 1], "bos": [1, 0], "bos_eos": [1, 1]}[boundary]
    for split, name in ((s, n) for s in ("train", "validation") for n in ("a", "b")):
        stream, entry = shards.stream(split, name), report["splits"][split][name]
        ids = stream.read(0, stream.n_tokens)
        assert [int((ids == i).sum()) for i in (1, 2)] == [k * stream.n_documents for k in per_document]
        windows = [stream.read(w * seq_len, seq_len + 1)[1:] for w in range(stream.n_windows(seq_len))]
        targets = np.concatenate([ids[:1], *windows, ids[len(ids) - entry["rest_tokens"] :]])
        assert entry["rest_tokens"] < seq_len and np.array_equal(targets, ids)


@pytest.mark.parametrize(
    ("boundary", "before", "after"), [("eos", None, 2), ("bos", 1, None), ("bos_eos", 1, 2)], ids=lambda v: str(v)
)
def test_each_document_begins_and_ends_as_the_boundary_says(data, tokenizer_folder, boundary, before, after):
    shards = prepare(replace(data, boundary=boundary, tokenizer=str(tokenizer_folder)), progress=quiet)
    assert shards.manifest["tokenizer"]["boundary"] == boundary
    tokenizer = load_tokenizer_file(tokenizer_folder)
    stream = shards.stream("train", "a")
    for i in range(stream.n_documents):
        ids = stream.document_text_ids(i).tolist()
        text = Path(stream.document_origin(i)).read_text(encoding="utf-8")
        assert ids == [i for i in (before, *tokenizer.encode(text), after) if i is not None]


def test_validation_is_held_out_by_the_text_alone(data, tmp_path):
    shards = prepare(data, progress=quiet)
    held = set(stored_texts(shards, "validation", "b"))
    assert 2 <= len(held) <= 16 and not held & set(stored_texts(shards, "train", "b"))  # 7 of 140 expected
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(sorted(lines[30:])))  # fewer documents, in another order
    again = prepare(data, path=tmp_path / "again", progress=quiet)
    assert set(stored_texts(again, "validation", "b")) == held - {json.loads(x)["text"] for x in lines[:30]}
    other = prepare(replace(data, seed=99), progress=quiet)
    assert set(stored_texts(other, "validation", "b")) != held


def test_two_documents_give_one_to_each_split_and_one_is_not_held_out(tmp_path, tokenizer_folder):
    for n, expected in ((1, (1, 0)), (2, (1, 1)), (3, (2, 1))):
        (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in PARAGRAPHS[:n]))
        source = Source(name="few", corpus=f"files:{tmp_path}/few.jsonl")
        few = Data(sources=(source,), vocab_size=VOCAB, tokenizer=str(tokenizer_folder), validation_fraction=1e-9)
        shards = prepare(few, path=tmp_path / f"few{n}", progress=quiet)
        assert tuple(shards.stream(s, "few").n_documents for s in ("train", "validation")) == expected


def test_the_same_texts_give_the_same_fingerprint_and_files_wherever_and_however_listed(data, tmp_path, monkeypatch):
    first = prepare(data, progress=quiet)
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *args, **kwargs: listed(*args, **kwargs)[::-1])
    second = prepare(data, path=tmp_path / "elsewhere", progress=quiet)
    assert second.fingerprint == first.fingerprint
    assert second.manifest["files"] == first.manifest["files"]
    monkeypatch.undo()
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("\n  \n")
    assert prepare(data, path=tmp_path / "spaced", progress=quiet).fingerprint == first.fingerprint
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"text": "one document more"}\n')
    assert prepare(data, path=tmp_path / "third", progress=quiet).fingerprint != first.fingerprint


def test_what_decides_the_shards_decides_their_default_folder(data, private_home):
    assert data_path(data).parent == home() / "data" == private_home / "data"
    assert data_path(replace(data, document_mask=True)) == data_path(data)
    others = [replace(data, boundary="bos"), replace(data, seed=5), replace(data, vocab_size=501)]
    assert len({data_path(d) for d in [data, *others]}) == 4
    assert data_path(replace(data, path="somewhere")) == Path.cwd() / "somewhere"


def test_a_second_call_finds_it_done_and_reads_no_corpus(data, tmp_path):
    first = prepare(data, progress=quiet)
    shutil.rmtree(tmp_path / "a")
    said: list[str] = []
    second = prepare(data, progress=said.append)
    assert second.fingerprint == first.fingerprint and not said


def test_files_that_changed_since_are_said_and_the_data_used_as_they_are(data, tmp_path, tokenizer_folder):
    tokenizer = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    data = replace(data, tokenizer=str(tokenizer))
    first = prepare(data, progress=quiet)
    said: list[str] = []
    (tmp_path / "a" / "more.txt").write_text("a file more")
    assert prepare(data, progress=said.append).fingerprint == first.fingerprint
    (line,) = said
    assert f"{first.path} is used as it was prepared, but source a (" in line and "124 files then, 125 now" in line
    (tmp_path / "a" / "more.txt").unlink()
    (tmp_path / "b.jsonl").write_text('{"text": "another corpus of the same name, as in another folder"}\n')
    prepare(data, progress=said.append)
    assert len(said) == 2 and "source b" in said[1] and "1 files then, 1 now, of other names or sizes" in said[1]
    shutil.rmtree(tokenizer)
    prepare(data, progress=said.append)
    train_tokenizer(PARAGRAPHS[:200], VOCAB).save(tokenizer)
    prepare(data, progress=said.append)
    assert len(said) == 5 and sum("but tokenizer (" in line for line in said) == 1


def test_numbers_are_said_before_and_after(data, capsys):
    shards = prepare(data)
    out, err = capsys.readouterr()
    assert not out
    stored = shards.manifest["report"]["conservation"]["tokens_stored"]
    before, after = err.index("MB of disk needed"), err.index(f"{stored:,} tokens in ")
    assert (
        before < after
        and "260 documents, about" in err
        and "120 of 124 documents kept; left out: 2 duplicates, 2 empty" in err
    )
    said = int(err.partition("260 documents, about ")[2].split(" tokens")[0].replace(",", ""))
    assert said == pytest.approx(stored, rel=0.2)


def test_the_limit_is_filled_and_its_last_document_ends_with_a_line(data, texts):
    kept = [t for t in dict.fromkeys(texts["b"]) if t not in texts["a"]]
    half = next(i for i, t in enumerate(kept) if i > 20 and "\n" in t[: len(t) // 2])
    limit = sum(len(t.encode()) for t in kept[:half]) + len(kept[half]) // 2
    limited = replace(data, vocab_size=400, sources=(data.sources[0], replace(data.sources[1], limit_mb=limit / 1e6)))
    shards = prepare(limited, progress=quiet)
    taken = set(stored_texts(shards, "train", "b") + stored_texts(shards, "validation", "b"))
    cut = kept[half][: kept[half].rindex("\n", 0, len(kept[half]) // 2) + 1]
    assert taken == {*kept[:half], cut}


def test_a_copy_at_the_limit_is_left_out_and_no_part_of_it_stored(tmp_path, tokenizer_folder):
    """A cut copy of a held-out document among the training documents would leak it."""
    first, second, third = (f"{i}\n" * 30 for i in "abc")
    lines = [json.dumps({"text": t}) + "\n" for t in (first, second, first, third)]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    (tmp_path / "y.jsonl").write_text("".join(lines[2:]) + json.dumps({"text": "more\n"}))
    sources = (
        Source(name="x", corpus=f"files:{tmp_path}/x.jsonl", limit_mb=150e-6),
        Source(name="y", corpus=f"files:{tmp_path}/y.jsonl"),
    )
    shards = prepare(Data(sources=sources, vocab_size=VOCAB, tokenizer=str(tokenizer_folder)), progress=quiet)
    x, y = (sorted(stored_texts(shards, "train", n) + stored_texts(shards, "validation", n)) for n in "xy")
    assert (x, y) == ([first, second, third[:30]], ["more\n"])
    assert [shards.manifest["report"]["sources"][n]["duplicates"] for n in "xy"] == [1, 2]


def test_half_characters_are_repaired_and_counted(tmp_path, tokenizer_folder):
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud800 here"}\n{"text": "whole"}\n')
    data = Data(
        sources=(Source(name="x", corpus=f"files:{tmp_path}/x.jsonl"),),
        vocab_size=VOCAB,
        tokenizer=str(tokenizer_folder),
    )
    shards = prepare(data, progress=quiet)
    texts = stored_texts(shards, "train", "x") + stored_texts(shards, "validation", "x")
    assert sorted(texts) == ["half ? here", "whole"]
    assert shards.manifest["report"]["sources"]["x"]["repaired"] == 1


def test_the_environments_own_text_is_prepared(tmp_path):
    sources = tuple(Source(name=n, corpus=f"local:{n}", limit_mb=0.15) for n in ("prose", "code"))
    shards = prepare(Data(sources=sources, vocab_size=1000), progress=quiet)
    for name in ("prose", "code"):
        streams = [shards.stream(split, name) for split in ("train", "validation")]
        assert 140_000 < sum(s.n_bytes for s in streams) <= 150_000 and all(s.n_documents for s in streams)
        for stream in streams:
            assert all(stream.document_origin(i).startswith(("stdlib:", "package:")) for i in range(stream.n_documents))


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


def test_a_failed_preparation_leaves_nothing(data, monkeypatch):
    monkeypatch.setattr(module, "_check_disk", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
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
        (f"files:{tmp_path}/empty.txt", r"source bad \(files:.*empty\.txt\) must give at least one document"),
        (f"files:{tmp_path}/cut.jsonl", r"source bad: .*cut\.jsonl, line 2 must be JSON"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(replace(data, sources=(data.sources[0], Source(name="bad", corpus=corpus))), progress=quiet)
    with pytest.raises(DataError, match=r"source copy .* that no other has; found .*'duplicates': 122"):
        prepare(replace(data, sources=(data.sources[0], copy)), progress=quiet)


def test_a_fast_engine_that_is_wrong_on_a_document_of_the_corpus_encodes_nothing(data, monkeypatch):
    honest = Tokenizer._encode_gigatoken

    def wrong_where_it_says_parser(self, texts):
        found = zip(texts, honest(self, texts), strict=True)
        return [ids[:-1] if "parser" in text else ids for text, ids in found]

    monkeypatch.setattr(Tokenizer, "_encode_gigatoken", wrong_where_it_says_parser)
    said: list[str] = []
    shards = prepare(data, progress=said.append)
    assert any("encoded by tokenizers" in line for line in said)
    assert any("gigatoken gives other ids than sentencepiece" in line for line in said)
    monkeypatch.undo()
    assert any("parser" in text for text in stored_texts(shards, "train", "a"))  # checks every text's digest


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
