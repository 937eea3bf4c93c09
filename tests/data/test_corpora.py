"""The corpora: what is read, in which order, and what is said about what is not."""

from __future__ import annotations

import gzip
import json
import os
import sys
import sysconfig
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tinylab.data import environment
from tinylab.data.corpora import Document, open_corpus
from tinylab.errors import DataError

LONG = "A sentence that says enough to be worth learning from, which a docstring of three words does not. " * 2
MODULE = f'''"""The module. {LONG}"""
import nothing_that_exists
raise SystemExit("this file must never be imported")


class Reader:
    """A reader.

        {LONG}
    """

    def read(self):
        r"""Read \\d+ lines. {LONG}"""

        def inner():
            """Not a member. {LONG}"""

    def short(self):
        """Too short."""


if True:

    async def fetch():
        \'\'\'Fetch. {LONG}\'\'\'
'''


@pytest.fixture
def environment_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a Python environment of given files (`lib/…`, `site-packages/…`) the running one."""

    def make(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / "env" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        library, packages = tmp_path / "env" / "lib", tmp_path / "env" / "site-packages"
        library.mkdir(exist_ok=True)
        packages.mkdir(exist_ok=True)
        monkeypatch.setattr(sys, "path", [str(packages)])
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
        return tmp_path / "env"

    return make


def read(spec: str) -> tuple[dict[str, str], Counter[str]]:
    skipped: Counter[str] = Counter()
    documents = list(open_corpus(spec, skipped))
    assert len({d.origin for d in documents}) == len(documents)
    return {d.origin: d.text for d in documents}, skipped


def test_prose_is_descriptions_documents_and_docstrings_with_relative_origins(environment_of):
    environment_of(
        {
            "lib/json/decoder.py": MODULE,
            "site-packages/pkg/__init__.py": f'"""The package. {LONG}"""\n',
            "site-packages/pkg/guide.md": f"# Guide\n\n{LONG}",
            "site-packages/pkg-1.0.dist-info/METADATA": f"Name: pkg\nVersion: 1.0\n\n{LONG}\n",
        }
    )
    documents, skipped = read("local:prose")
    assert documents == {
        "stdlib:json.decoder": f"The module. {LONG}",
        "stdlib:json.decoder.Reader": f"A reader.\n\n{LONG}",
        "stdlib:json.decoder.Reader.read": f"Read \\d+ lines. {LONG}",
        "stdlib:json.decoder.fetch": f"Fetch. {LONG}",
        "package:pkg": f"The package. {LONG}",
        "package:pkg/guide.md": f"# Guide\n\n{LONG}",
        "package:pkg/METADATA": LONG.strip(),
    }
    assert skipped == {"texts too short": 1}


def test_code_is_the_sources_as_they_stand(environment_of):
    windows = MODULE.replace("\n", "\r\n")
    environment_of({"lib/a.py": MODULE, "lib/b/c.py": windows, "site-packages/p/q.py": MODULE + "# end\n"})
    documents, skipped = read("local:code")
    assert documents == {"stdlib:a.py": MODULE, "stdlib:b/c.py": windows, "package:p/q.py": MODULE + "# end\n"}
    assert not skipped


def test_what_is_passed_over_is_counted_by_reason(environment_of):
    environment_of(
        {
            "lib/latin.py": "# caf\xe9 ".encode("latin-1") * 40,
            "lib/broken.py": f'"""{LONG}"""\ndef (:\n',
            "lib/large.py": "x = 1\n" * 40_000,
            "lib/tiny.py": "x = 1\n",
            "lib/here.py": f'"""{LONG} {sys.prefix}/bin"""\n',
            "site-packages/p/numbers.txt": "0.125 0.25;\n" * 100,
        }
    )
    documents, skipped = read("local:prose")
    assert not documents
    assert skipped == {
        "files that are not UTF-8": 1,
        "files over 200,000 bytes": 1,
        "sources that cannot be parsed": 1,
        "texts that name a folder of this machine": 1,
        "text files that are no prose": 1,
    }
    documents, skipped = read("local:code")
    assert list(documents) == ["stdlib:broken.py"]
    assert skipped["texts too short"] == 1 and skipped["texts that name a folder of this machine"] == 1


def test_tests_licences_and_tinylab_itself_are_left_out(environment_of):
    environment_of(
        {
            "lib/test/test_os.py": MODULE,
            "lib/site-packages/other.py": MODULE,
            "site-packages/numpy/tests/test_a.py": MODULE,
            "site-packages/tinylab/data/order.py": MODULE,
            "site-packages/tinylab-0.1.dist-info/METADATA": f"Name: tinylab\n\n{LONG}",
            "site-packages/__editable___tinylab_finder.py": MODULE,
            "site-packages/p/LICENSE.txt": LONG,
            "site-packages/p-1.dist-info/licenses/a.md": LONG,
        }
    )
    assert read("local:prose") == ({}, {}) and read("local:code") == ({}, {})


def test_order_does_not_depend_on_how_folders_are_listed(environment_of, monkeypatch):
    environment_of({f"site-packages/p{i}/m{j}.py": MODULE + f"# {i}{j}\n" for i in range(6) for j in range(4)})
    before = list(open_corpus("local:code"))
    walk = os.walk

    def reversed_walk(root):
        for folder, folders, names in walk(root):
            folders.sort(reverse=True)
            names.sort(reverse=True)
            yield folder, folders, names

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert list(open_corpus("local:code")) == before


def test_the_first_documents_are_spread_over_the_packages_and_nothing_further_is_read(environment_of, monkeypatch):
    environment_of({f"site-packages/{p}/m{j}.py": MODULE + f"# {p}{j}\n" for p in "abcdefghij" for j in range(10)})
    opened = []
    original = environment._read
    monkeypatch.setattr(environment, "_read", lambda unit, skipped: opened.append(unit) or original(unit, skipped))
    first = list(islice(open_corpus("local:code"), 20))
    assert len({d.origin.partition("/")[0] for d in first}) >= 7  # 20 draws from 10 packages: 8.8 expected
    assert len(opened) == 20


def test_the_running_environment_gives_both_corpora_without_a_path_of_this_machine():
    for spec in ("local:prose", "local:code"):
        for document in islice(open_corpus(spec), 200):
            label, _, rest = document.origin.partition(":")
            assert label in ("stdlib", "package") and rest and not rest.startswith("/")
            assert document.text.strip() and sys.prefix not in document.text
            assert "tinylab" not in rest


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


def test_a_cut_last_frame_is_an_error_even_when_the_lines_before_it_are_whole(tmp_path):
    import zstandard

    frames = [zstandard.ZstdCompressor().compress(json.dumps({"text": t}).encode() + b"\n") for t in TEXTS]
    path = tmp_path / "cut.jsonl.zst"
    path.write_bytes(b"".join(frames)[:-5])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst must be readable; found: .* in the middle of a frame"):
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


def test_a_description_or_name_that_is_not_utf8_stops_nothing(environment_of):
    environment_of(
        {
            "site-packages/old-1.0.dist-info/METADATA": f"Name: old\n\ncaf\xe9 {LONG}".encode("latin-1"),
            "site-packages/pkg-1.0.dist-info/METADATA": f"Name: pkg\n\n{LONG}",
        }
    )
    documents, skipped = read("local:prose")
    assert documents["package:pkg/METADATA"] == LONG.strip() and "package:old/METADATA" not in documents
    assert skipped["files that are not UTF-8"] == 1
    unit = environment._Unit("stdlib:caf\udce9.py", "")
    assert environment._spread({unit.origin: unit}) == [unit]
