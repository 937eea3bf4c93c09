"""CONTRIBUTING.md leads to files that are there, and names every folder of the package."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_path_exists():
    paths = re.findall(r"`((?:tinylab|tests|notebooks)/[\w/.]+)`", TEXT)
    assert len(paths) > 30
    assert [p for p in paths if "NN_" not in p and not (ROOT / p).exists()] == []


def test_the_walk_and_the_places_name_every_folder_of_the_package():
    folders = [p.name for p in (ROOT / "tinylab").iterdir() if (p / "__init__.py").exists()]
    assert [name for name in folders if f"`{name}`" not in TEXT and f"tinylab/{name}/" not in TEXT] == []


def test_every_target_it_names_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [t for t in re.findall(r"^make (\w+)", TEXT, re.MULTILINE) if f"\n{t}:" not in makefile] == []
