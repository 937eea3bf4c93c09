"""Nothing damaged is read, and every difference between prepared data and their manifest is found."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinylab.data.shards.format import fingerprint_of
from tinylab.data.shards.integrity import verify_shards
from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.errors import DataError
from tinylab.runs.manifest import sha256_file, verify_folder

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2], [14, 2], [2]]  # 15 tokens


def test_the_folder_verifies_as_every_committed_folder_does(make_data):
    shards = make_data({"a": DOCUMENTS})
    assert verify_folder(shards.path) == []
    assert shards.fingerprint == fingerprint_of(json.loads((shards.path / "manifest.json").read_text()))
    assert (shards.vocab_size, shards.tokenizer_path) == (100, shards.path / "tokenizer")


def _two(make_data) -> tuple[ShardSet, Path, Path]:
    """Data of three shards of which the second and third have equal sizes, and the paths of these two."""
    shards = make_data({"a": [[5, 6, 7, 2], [8, 9, 10, 2], [11, 12, 13, 2]]}, shard_tokens=4)
    return shards, shards.path / "train/a/00001.bin", shards.path / "train/a/00002.bin"


def _wide(path: Path, _: Path) -> None:
    np.fromfile(path, "<u2").astype("<u4").tofile(path)


def _random(path: Path, _: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _shifted(path: Path, _: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[1:] + data[:1])


def _id_65535(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")


def _swapped(path: Path, other: Path) -> None:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


MUTATIONS = {
    "wrong dtype": _wide,
    "random bytes": _random,
    "shifted by a byte": _shifted,
    "id 65535": _id_65535,
    "truncated": lambda path, _: os.truncate(path, 6),
    "deleted": lambda path, _: path.unlink(),
    "swapped": _swapped,
    "extra byte": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
}


def _read_everything(path: Path) -> None:
    """Open a data folder and read every token, document start and line of provenance of it."""
    shards = open_shards(path)
    for split, sources in shards.manifest["splits"].items():
        for name in sources:
            stream = shards.stream(split, name)
            stream.read(0, stream.n_tokens)
            stream.documents(0, stream.n_tokens)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_damaged_shard_is_named_before_a_token_of_it_is_read(make_data, mutation):
    shards, path, other = _two(make_data)
    MUTATIONS[mutation](path, other)
    with pytest.raises(DataError, match=r"damaged files?: .*00001\.bin.*prepare it again \(tinylab prepare\)"):
        open_shards(shards.path).stream("train", "a").read(4, 1)
    assert any("00001.bin: " in problem for problem in verify_shards(shards.path))


@pytest.mark.parametrize("file", ["00001.idx", "00001.docs.jsonl"])
def test_a_damaged_index_or_provenance_is_named_before_it_is_read(make_data, file):
    shards, path, _ = _two(make_data)
    path = path.with_name(file)
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    stream = open_shards(shards.path).stream("train", "a")
    assert stream.read(0, 12).tolist() == [5, 6, 7, 2, 8, 9, 10, 2, 11, 12, 13, 2]
    with pytest.raises(DataError, match=rf"damaged file: .*{file}: SHA-256 differs"):
        stream.documents(4, 4)


def test_a_shard_is_compared_when_it_is_first_read_and_no_other_is(make_data, monkeypatch):
    shards, path, other = _two(make_data)
    _random(other, other)
    hashed: list[str] = []
    monkeypatch.setattr("tinylab.runs.manifest.sha256_file", lambda p: hashed.append(p.name) or sha256_file(p))
    stream = open_shards(shards.path).stream("train", "a")
    assert hashed == ["tokenizer.json"]
    assert stream.read(5, 2).tolist() == stream.read(5, 2).tolist() == [9, 10]
    assert hashed == ["tokenizer.json", path.name]
    with pytest.raises(DataError, match=r"00002\.bin: SHA-256 differs"):
        stream.read(5, 4)


def test_every_damaged_file_is_listed_at_once(make_data):
    shards, path, other = _two(make_data)
    path.unlink()
    os.truncate(other, 2)
    path.with_suffix(".idx").write_bytes(b"\0" * 8 * 9)
    lines = path.with_suffix(".docs.jsonl")
    lines.write_text(lines.read_text().replace("train", "trainx"[1:]))
    (shards.tokenizer_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match="found 4 damaged files") as caught:
        open_shards(shards.path)
    expected = [
        "tokenizer.json: SHA-256 differs",
        "00001.bin: missing",
        "00001.docs.jsonl: SHA-256 differs",
        "00001.idx: 8 bytes expected, 72 found",
        "00002.bin: 8 bytes expected, 2 found",
    ]
    assert [e in p for e, p in zip(expected, verify_shards(shards.path), strict=True)] == [True] * 5
    del expected[2]  # of the size that it should have: found when it is read
    assert all(e in str(caught.value) for e in expected)


def test_what_may_not_be_read_is_not_called_damaged(make_data, monkeypatch):
    shards, _, _ = _two(make_data)

    def forbidden(path: Path) -> str:
        raise PermissionError(13, os.strerror(13), str(path))

    stream = open_shards(shards.path).stream("train", "a")
    monkeypatch.setattr("tinylab.runs.manifest.sha256_file", forbidden)
    with pytest.raises(DataError, match=r"00001\.bin must be readable; found: Permission denied\. Check"):
        stream.read(5, 1)
    monkeypatch.setattr("tinylab.data.shards.integrity._intact", set())
    with pytest.raises(DataError, match=r"tokenizer\.json must be readable; found: Permission denied\. Check"):
        open_shards(shards.path)


def test_an_empty_split_may_have_a_folder(make_data):
    shards, _, _ = _two(make_data)
    (shards.path / "validation" / "a").mkdir(parents=True)
    assert verify_shards(shards.path) == []
    (shards.path / "validation" / "b").mkdir()
    assert verify_shards(shards.path) == [
        f"{shards.path}/validation/b: empty directory that the manifest does not list"
    ]


@pytest.fixture(scope="module")
def intact(write_data, tmp_path_factory) -> Path:
    """A data folder whose files a test may damage, if it puts them back."""
    return write_data(tmp_path_factory.mktemp("damage") / "data", {"a": DOCUMENTS}, {"a": [[1, 2]]}, shard_tokens=6)


@settings(max_examples=500, derandomize=True, deadline=None)  # reliability.md, R9
@given(data=st.data())
def test_any_damage_to_any_file_is_found(intact, data):
    path = data.draw(st.sampled_from(sorted(p for p in intact.rglob("*") if p.is_file())))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["bit", "cut", "extra", "zeros", "random", "deleted"]))
    if damage == "bit":
        changed = bytearray(content)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        changed = content[:at]
    elif damage == "extra":
        changed = content[:at] + b"\0" + content[at:]
    elif damage == "zeros":
        changed = content[:at] + bytes(len(content) - at)
    else:
        changed = data.draw(st.binary(min_size=len(content), max_size=len(content)))
    assume(bytes(changed) != content)
    try:
        path.unlink() if damage == "deleted" else path.write_bytes(bytes(changed))
        with pytest.raises(DataError):
            _read_everything(intact)
        with suppress(DataError):  # the manifest itself
            assert verify_shards(intact) != []
    finally:
        path.write_bytes(content)


def test_digests_are_remembered_only_while_the_file_stays_the_same(make_data, monkeypatch):
    shards, path, _ = _two(make_data)
    monkeypatch.setattr("tinylab.data.shards.integrity._RACY_NS", -(10**18))
    calls: list[Path] = []
    monkeypatch.setattr("tinylab.runs.manifest.sha256_file", lambda p: calls.append(p) or sha256_file(p))
    _read_everything(shards.path)
    first = len(calls)
    _read_everything(shards.path)
    assert len(calls) == first
    stat = path.stat()
    _id_65535(path, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"00001\.bin: SHA-256 differs"):
        _read_everything(shards.path)


def test_digests_of_files_younger_than_the_clocks_grain_are_not_remembered(make_data, monkeypatch):
    shards, _, _ = _two(make_data)
    monkeypatch.setattr("tinylab.data.shards.integrity._RACY_NS", 10**18)
    calls: list[Path] = []
    monkeypatch.setattr("tinylab.runs.manifest.sha256_file", lambda p: calls.append(p) or sha256_file(p))
    _read_everything(shards.path)
    first = len(calls)
    _read_everything(shards.path)
    assert len(calls) == 2 * first > 0


def test_a_folder_without_data_and_an_altered_manifest_are_refused(make_data, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"nothing must hold prepared data \(manifest\.json\); found none.*tinylab prepare"
    ):
        open_shards(tmp_path / "nothing")
    path = make_data({"a": DOCUMENTS}).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="fingerprint must belong to its content"):
        open_shards(path)
    manifest["tokenizer"]["vocab_size"] = 14
    manifest["fingerprint"] = fingerprint_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=r"sizes, counts and ids of shards must fit together; found otherwise in train/a"
    ):
        open_shards(path)
    (path / "manifest.json").write_text("[1, 2")
    with pytest.raises(DataError, match="readable manifest"):
        open_shards(path)
    shutil.rmtree(path)
