"""Importing tinylab loads nothing heavy, and its public names arrive at first use."""

from __future__ import annotations

import subprocess
import sys

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
        f"import sys; from tinylab.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        tinylab.nonesuch  # noqa: B018


@pytest.mark.parametrize("first", ["tinylab.evaluate.store", "tinylab.train.loop", "tinylab"])
def test_evaluate_and_train_can_be_called_whatever_was_imported_before(first: str):
    assert fresh(f"import {first}, tinylab; print(callable(tinylab.evaluate), callable(tinylab.train))") == "True True"
