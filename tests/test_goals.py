"""A campaign counts trials, leaves out what has passed, and names what failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import goals
import pytest

TESTS = """
import pytest

@pytest.mark.goal("R8")
def test_holds(record_property):
    record_property("trials", 700)

@pytest.mark.goal("R1")
@pytest.mark.parametrize("seed", [0, 1])
def test_fails_once(seed):
    assert seed != 1
"""


@pytest.fixture
def campaign(tmp_path: Path):
    """Runs pytest over the tests above, results in a folder of their own; returns what it printed."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = goal(name): a goal\n")
    environment = os.environ | {"PYTHONPATH": str(Path(goals.__file__).parent)}

    def go(*more: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "goals", "-p", "no:cacheprovider"]
        ended = subprocess.run(
            [*command, "--campaign", "results", *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return ended.stdout + ended.stderr

    return go


def test_a_repeat_leaves_out_what_passed_and_the_page_counts_both(campaign, tmp_path: Path):
    assert "1 failed, 2 passed" in campaign()
    assert "1 failed, 2 deselected" in campaign(), "only what failed runs again"
    text = goals.page(list(goals._results(str(tmp_path / "results"))))
    row = {line.split(" | ")[0]: line.split(" | ")[2:-1] for line in text.splitlines() if line.startswith("| R")}
    assert row["| R8"] == ["700", "700", "0", "0.4%"]
    assert row["| R1"] == ["200", "1", "1", ""], "no bound beside a failure"
    assert "- `test_it.py::test_fails_once[1]`" in text


def test_one_goal_runs_alone_and_an_unknown_one_is_refused(campaign):
    assert "1 passed, 2 deselected" in campaign("--goal", "R8")
    assert "--goal must be one of R1, R2" in campaign("--goal", "R99")
