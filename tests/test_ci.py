"""The checks of a clean checkout: what they install, what they say at their end, and their exit code."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CI = ROOT / ".ci"
PYTEST = """......s
=========================== short test summary info ============================
SKIPPED [2] tests/ui/test_lab.py:35: no Chromium found (apt-get install chromium)
{result}
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of programs that stands alone on the search path: what a script needs, and nothing of apt or Slurm."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "env", "cat", "tee", "grep", "mktemp", "rm", "dirname"):
        (folder / name).symlink_to(shutil.which(name) or name)
    put(folder, "timeout", 'shift; exec "$@"')
    put(folder, "id", "echo 0")
    put(folder, "munged", "")  # else a real one outside the search path would count
    return folder


def put(folder: Path, name: str, body: str) -> None:
    """A program that runs `body`."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(script: Path, tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(tools), "HOME": str(tools), "TMPDIR": str(tools)}
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)


def test_what_is_missing_is_installed_without_questions(tools: Path):
    put(tools, "apt-get", f'echo "$DEBIAN_FRONTEND: $*" >> {tools}/called')
    done = run(CI / "system-packages", tools)
    assert (done.returncode, done.stdout) == (0, "installed chromium slurm-wlm\n"), done.stderr
    assert (tools / "called").read_text().splitlines() == [
        "noninteractive: update -qq",
        "noninteractive: install -qq -y --no-install-recommends chromium slurm-wlm",
    ]


@pytest.mark.parametrize(
    ("program", "body", "reason"),
    [
        ("id", "echo 1000", "only root may install"),
        ("true", "", "there is no apt-get here"),
        ("apt-get", "exit 100", "apt-get update gave no answer within 120 s"),
        ("apt-get", '[ "$1" = update ]', "apt-get install failed"),
    ],
)
def test_where_nothing_can_be_installed_the_reason_is_said_and_nothing_fails(
    tools: Path, program: str, body: str, reason: str
):
    put(tools, program, body)
    done = run(CI / "system-packages", tools)
    assert (done.returncode, done.stdout) == (0, f"skipped chromium slurm-wlm: {reason}\n"), done.stderr


def test_nothing_is_asked_of_apt_where_everything_is_there(tools: Path):
    for name in ("chromium", "sbatch"):
        put(tools, name, "")
    put(tools, "apt-get", f"touch {tools}/called")
    assert run(CI / "system-packages", tools).returncode == 0
    assert not (tools / "called").exists()


@pytest.fixture
def checkout(tmp_path: Path, tools: Path) -> Path:
    """A folder with the script, and with system packages that need nothing."""
    folder = tmp_path / "checkout"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(CI / "run", folder / ".ci" / "run")
    put(folder / ".ci", "system-packages", "echo there")
    return folder


@pytest.mark.parametrize(
    ("result", "code"),
    [("12 passed, 2 skipped in 3.10s", 0), ("1 failed, 12 passed, 2 skipped in 300.50s (0:05:00)", 2)],
)
def test_the_last_lines_are_what_skipped_and_the_result_and_the_exit_code_is_that_of_the_tests(
    checkout: Path, tools: Path, result: str, code: int
):
    (tools / "said").write_text(PYTEST.format(result=result))
    put(tools, "make", f'[ "$1" = setup ] || {{ cat {tools}/said; exit {code}; }}')
    done = run(checkout / ".ci" / "run", tools)
    assert done.returncode == code
    assert done.stdout.splitlines()[-4:] == [
        "== skipped, and why (tests marked gpu and stress have make targets of their own)",
        "SKIPPED [2] tests/ui/test_lab.py:35: no Chromium found (apt-get install chromium)",
        "== result",
        result,
    ]
    assert not list(tools.glob("tmp.*"))


def test_a_set_up_that_fails_ends_the_checks(checkout: Path, tools: Path):
    put(tools, "make", '[ "$1" = test ] || exit 2')
    done = run(checkout / ".ci" / "run", tools)
    assert done.returncode == 2
    assert "== make test" not in done.stdout


def test_the_checks_call_the_test_target_and_are_executable():
    assert "\nmake setup\n" in (CI / "run").read_text() and "\nmake test " in (CI / "run").read_text()
    assert os.access(CI / "run", os.X_OK) and os.access(CI / "system-packages", os.X_OK)
