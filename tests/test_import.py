"""Importing tinylab loads nothing heavy, and its public names arrive at first use."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

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


def test_import_costs_less_than_a_tenth_of_a_second():
    def seconds(code: str) -> float:
        def once() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            return time.perf_counter() - start

        return statistics.median(once() for _ in range(5))

    assert seconds("import tinylab") - seconds("pass") < 0.1


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
