"""Preparation: every token accounted for, and one identity from the same texts, wherever and however listed."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinylab.config.schema import Data, Source
from tinylab.data.audit import audit_shards
from tinylab.data.prepare import data_path, prepare
from tinylab.data.shards.reader import ShardSet
from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.data.tokenizer.load import load_tokenizer_file, train_tokenizer
from tinylab.runs.folder import home

from .paragraphs import PARAGRAPHS, VOCAB, quiet


@pytest.fixture
def texts(source_texts: dict[str, list[str]]) -> dict[str, list[str]]:
    return source_texts


def stored_texts(shards: ShardSet, split: str, name: str) -> list[str]:
    """The documents of a source, decoded from their ids, each checked against its digest."""
    tokenizer, stream, found = load_tokenizer_file(shards.tokenizer_path), shards.stream(split, name), []
    for i in range(stream.n_documents):
        found.append(tokenizer.decode(stream.document_text_ids(i)))
        assert hashlib.sha256(found[-1].encode()).hexdigest() == stream.document_line(i)["sha256"]
    return found


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
        text = Path(stream.document_line(i)["origin"]).read_text(encoding="utf-8")
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
    assert len(said) == 2 and "source b" in said[1] and "1 files then, 1 now, with other names or sizes" in said[1]
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
            assert all(
                stream.document_line(i)["origin"].startswith(("stdlib:", "package:")) for i in range(stream.n_documents)
            )


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
