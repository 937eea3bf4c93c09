"""Importing tinylab loads nothing heavy, and its public names arrive at first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinylab

HEAVY = [
    "torch",
    "numpy",
    "pandas",
    "matplotlib",
    "transformers",
    "datasets",
    "lm_eval",
    "papermill",
    "ipywidgets",
    "nbconvert",
    "pyarrow",
    "tyro",
    "scipy",
]


def fresh(code: str) -> str:
    """Standard output of `code` in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    assert fresh(f"import sys, tinylab; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_command_line_module_and_its_help_load_nothing_heavy():
    code = (
        f"import sys; from tinylab.cli.command import main; main(['--help'])\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert fresh(code).splitlines()[-1] == "[]"


def test_foundations_load_no_third_party_package():
    code = f"import sys, tinylab.config.presets, tinylab.runs.folder; print([m for m in {HEAVY} if m in sys.modules])"
    assert fresh(code) == "[]"


def test_import_adds_a_handful_of_standard_modules_only():
    # The cost of an import counted in modules, because timing decides nothing; `typing` brings most of them.
    code = (
        "import sys; before = set(sys.modules); import tinylab; new = sorted(set(sys.modules) - before - {'tinylab'})\n"
        "print(len(new), [m for m in new if m.split('.')[0] not in sys.stdlib_module_names])"
    )
    count, foreign = fresh(code).split(" ", 1)
    assert foreign == "[]"
    assert int(count) < 20


def test_every_public_name_arrives():
    missing = {}
    for name in tinylab._NAMES:
        try:
            getattr(tinylab, name)
        except (ImportError, AttributeError) as error:
            missing[name] = str(error)
    assert missing == {}


def test_public_names_are_listed():
    assert {"Run", "load_model", "evaluate", "compare", "__version__"} <= set(dir(tinylab))


def test_type_checkers_see_the_public_names_and_no_others():
    tree = ast.parse(Path(tinylab.__file__).read_text(encoding="utf-8"))
    blocks = {ast.unparse(node.test): node.body for node in tree.body if isinstance(node, ast.If)}
    declared = [
        name.asname for node in blocks["TYPE_CHECKING"] if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert sorted(map(str, declared)) == sorted(tinylab._NAMES)
    # A __getattr__ that they see makes every misspelt name a valid one.
    assert not [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__getattr__"]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        tinylab.nonesuch  # noqa: B018


@pytest.mark.parametrize("first", ["tinylab.evaluation.records", "tinylab.training.loop", "tinylab"])
def test_evaluate_and_train_can_be_called_whatever_was_imported_before(first: str):
    assert fresh(f"import {first}, tinylab; print(callable(tinylab.evaluate), callable(tinylab.train))") == "True True"


def test_evaluate_and_train_show_their_parameters():
    """As Shift+Tab in a notebook asks for them."""
    code = "from inspect import signature as s; import tinylab; print(list(s(tinylab.{}).parameters)[:2])"
    assert fresh(code.format("evaluate")) == "['ref', 'tasks']"
    assert fresh(code.format("train")) == "['config', 'run']"
