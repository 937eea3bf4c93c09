"""What the README tells a new user to type exists."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tinylab.cli.command import VERBS, main
from tinylab.config.presets import preset

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def typed(program: str) -> list[list[str]]:
    """Words after `program` in code blocks and inline code."""
    code = [*re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL), *re.findall(r"`([^`\n]+)`", TEXT)]
    lines = [line.partition("#")[0].split() for block in code for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == [program] and len(line) > 1]


def test_every_make_command_is_a_target():
    wanted = {words[0] for words in typed("make")}
    assert {"demo", "lab", "test"} <= wanted
    assert wanted - TARGETS == set()


def test_every_verb_and_option_exists(capsys: pytest.CaptureFixture[str]):
    commands = [words for words in typed("tinylab") if words[0] not in ("--help", "VERB")]
    assert len(commands) >= 6
    for verb, *rest in commands:
        assert verb in VERBS
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        for word in rest:
            if word.startswith("-"):
                assert re.search(rf"(^|[ ,]){re.escape(word)}\b", shown, re.MULTILINE), f"tinylab {verb} {word}"


def test_presets_exist():
    for words in typed("tinylab"):
        for option, value in pairwise(words):
            if option == "--preset":
                preset(value)


def test_every_path_exists():
    ours = re.findall(r"`((?:tinylab|env|notebooks)/[\w./*-]+)`", TEXT)
    assert len(ours) > 8
    assert [path for path in ours if not list(ROOT.glob(path.rstrip("/")))] == []


def test_the_named_checkpoint_is_the_last_of_the_demo():
    steps = re.findall(r"runs/demo/checkpoints/step-(\d{8})", TEXT)
    assert [int(s) for s in steps] == [preset("demo").steps]


def test_the_tree_names_every_folder_and_module():
    tree = TEXT[TEXT.index("README.md            ") : TEXT.index("Imports go one way")]
    package = ROOT / "tinylab"
    names = [p.name for p in package.iterdir() if not p.name.startswith("_")]
    assert [n for n in names if n not in tree] == []


def test_the_page_says_where_a_cpu_build_of_torch_comes_from():
    assert "TORCH_INDEX=" in TEXT


def test_no_speed_or_score_stands_here_without_a_command():
    # Numbers with a unit of speed, share or memory must lie within three lines of a command in backquotes.
    lines = TEXT.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"\d\s?(%|tokens/s|GiB|GB|nats|seconds|minutes| s\b)", line):
            assert any("`" in near for near in lines[max(0, i - 3) : i + 4]), line
