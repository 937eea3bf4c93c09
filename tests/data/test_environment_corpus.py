"""The corpora of the running Python: its prose and code, in one order, and nothing of this machine in them."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tinylab.data.corpus import environment
from tinylab.data.corpus.sources import open_corpus

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
