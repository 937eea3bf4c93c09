"""The corpora of files and data sets: every format read alike, and what cannot be read named."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tinylab.data.corpus.sources import Document, open_corpus
from tinylab.errors import DataError

TEXTS = ["First.\n", "Second\twith é and\r\n lines", "Third"]


def write_corpus(path: Path, texts: list[str], field: str = "text") -> None:
    lines = "".join(json.dumps({field: t, "meta": i}) + "\n" for i, t in enumerate(texts)).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        import zstandard

        half = lines.index(b"\n") + 7  # two frames, cut inside a line: concatenated files are common
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"meta": range(len(texts)), field: texts}), path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_of_many_documents_gives_the_same(tmp_path, ending):
    path = tmp_path / f"books{ending}"
    write_corpus(path, TEXTS)
    found = list(open_corpus(f"files:{path}"))
    assert found == [Document(text, f"{path}:{i}") for i, text in enumerate(TEXTS, start=1)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_the_column_content_of_starcoderdata_is_read_where_there_is_no_text(tmp_path, ending):
    path = tmp_path / f"code{ending}"
    write_corpus(path, TEXTS, "content")
    assert [d.text for d in open_corpus(f"files:{path}")] == TEXTS


def test_a_line_of_many_megabytes_is_read_in_the_time_of_many_lines(tmp_path):
    import zstandard

    path = tmp_path / "long.jsonl.zst"
    line = json.dumps({"text": "ab " * 10_000_000}).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(line))
    begun = time.monotonic()
    (document,) = open_corpus(f"files:{path}")
    assert len(document.text) == 30_000_000
    assert time.monotonic() - begun < 10  # 0.2 s; copying the rest at each read took 45 s


def test_files_come_sorted_from_any_depth_and_several_endings(tmp_path):
    for name in ("b.txt", "a/z.md", "a/deep/er/m.py", "a/skip.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    found = list(open_corpus(f"files:{tmp_path}/**/*.{{txt,md,py}}"))
    names = ["a/deep/er/m.py", "a/z.md", "b.txt"]
    assert [d.origin for d in found] == [str(tmp_path / n) for n in names]
    assert [d.text for d in found] == [f"text of {n}\r\n" for n in names]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named_and_never_shorter_in_silence(tmp_path, ending, damage):
    path = tmp_path / f"books{ending}"
    write_corpus(path, [t * 500 for t in TEXTS])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 5] if damage == "cut" else b"nothing of the kind" * 3)
    with pytest.raises(DataError, match=rf"{path}.* must be"):
        list(open_corpus(f"files:{path}"))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_of_no_bytes_is_a_failed_download_and_no_empty_corpus(tmp_path, ending):
    path = tmp_path / f"books{ending}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path} must be .* (no|0) bytes"):
        list(open_corpus(f"files:{path}"))


def test_text_of_a_parquet_file_that_is_no_utf8_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "books.parquet"
    text = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(DataError, match=rf"{path} must be a Parquet file of UTF-8 text; found: 'utf-8' codec"):
        list(open_corpus(f"files:{path}"))


def test_a_name_with_characters_of_patterns_is_the_file_of_that_name(tmp_path):
    for name in ("notes [2023].txt", "a{b,c}.txt"):
        (tmp_path / name).write_text(name)
        assert [d.text for d in open_corpus(f"files:{tmp_path}/{name}")] == [name]


def test_a_cut_last_frame_is_an_error_even_when_all_lines_before_it_are_complete(tmp_path):
    import zstandard

    frames = [zstandard.ZstdCompressor().compress(json.dumps({"text": t}).encode() + b"\n") for t in TEXTS]
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(b"".join(frames)[:-5])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst must be readable; found: Truncated compressed stream"):
        list(open_corpus(f"files:{path}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2 must be JSON"),
        ('{"body": "x"}', r"line 2 must be an object with the field text or content; found body"),
        ("{}", r"line 2 must be an object with the field text or content; found no field"),
        ("[" * 100_000, r"line 2 must be JSON; found: maximum recursion depth"),
        ('["x"]', r"line 2 must be an object with the field text or content; found list"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(open_corpus(f"files:{path}"))


def test_rows_without_text_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": null}\n')
    skipped: Counter[str] = Counter()
    assert [d.text for d in open_corpus(f"files:{path}", skipped)] == ["good"]
    assert skipped == {"rows without text": 1}


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"latin\.txt must be UTF-8; found byte 0xe9 at 3"):
        list(open_corpus(f"files:{tmp_path}/*.txt"))
    with pytest.raises(DataError, match=r"gone\.md must be readable; found: No such file"):
        list(open_corpus(f"files:{tmp_path}/*.md"))
    with pytest.raises(DataError, match=r"must match files ending in .*; found .*image\.png"):
        open_corpus(f"files:{tmp_path}/*")
    with pytest.raises(DataError, match=r"must match at least one file; found none"):
        open_corpus(f"files:{tmp_path}/*.parquet")


@pytest.mark.parametrize("spec", ["local:poetry", "files:", "hf:", "s3:bucket", "prose"])
def test_an_unknown_corpus_names_the_known_ones(spec):
    with pytest.raises(DataError, match=r"local:prose, local:code, files:GLOB or hf:NAME"):
        open_corpus(spec)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Hugging Face's libraries as they are without a network, with a cache of their own."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_data_set_folder_is_streamed(tmp_path, offline, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    write_corpus(folder / "train-00000.parquet", TEXTS)
    write_corpus(folder / "train-00001.parquet", ["Fourth"])
    found = list(open_corpus(f"hf:{folder}"))
    assert found == [Document(text, f"hf:{folder}:train:{i}") for i, text in enumerate([*TEXTS, "Fourth"])]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [d.origin for d in open_corpus("hf:~/set")] == [f"hf:~/set:train:{i}" for i in range(4)]


def test_a_configuration_of_a_data_set_is_chosen_by_name(tmp_path, offline):
    folder = tmp_path / "set"
    for name, text in (("en", "english"), ("fr", "français")):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({"content": text}) + "\n")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("en", "fr"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [d.text for d in open_corpus(f"hf:{folder}:fr")] == ["français"]


def test_a_data_set_without_text_or_out_of_reach_says_what_to_do(tmp_path, offline):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"must have a column text or content; found body"):
        open_corpus(f"hf:{folder}")
    with pytest.raises(DataError, match=r"hf:nobody/nothing must be a data set that can be reached; .*local files"):
        open_corpus("hf:nobody/nothing")
