"""The Makefile names what the README promises, and each target does its own set-up. Nothing is installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("setup", "demo", "test", "lab", "notebooks", "stress", "bench", "bench-gpu", "lint", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_run(*arguments: str, folder: Path = ROOT, path: str | None = None) -> str:
    """What make would do, without doing it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = path or environment["PATH"]
    done = subprocess.run(["make", "-n", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of what make reads, as in a bare clone."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "env", tmp_path / "env")
    return tmp_path


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "clean"])
def test_every_target_makes_the_environment_first_in_a_bare_clone(bare: Path, target: str):
    plan = dry_run(target, folder=bare)
    assert "-m venv" in plan
    assert '-e ".[notebook,evaluate,dev]"' in plan


def stamps(folder: Path) -> list[str]:
    return re.findall(r"touch (\.venv/\.\S+)", dry_run("setup", folder=folder))


def test_nothing_is_installed_again_when_nothing_changed(bare: Path):
    (bare / ".venv").mkdir()
    for stamp in stamps(bare):
        (bare / stamp).touch()
    assert "pip install" not in dry_run("setup", folder=bare)


@pytest.mark.parametrize("name", ["pyproject.toml", "env/constraints.txt", "env/constraints-cpu.txt"])
def test_a_changed_requirement_is_installed(bare: Path, name: str):
    before = stamps(bare)
    with open(bare / name, "a") as file:
        file.write("\n# changed\n")
    after = stamps(bare)
    assert before[0] == after[0], "the environment itself is kept"
    assert before[1] != after[1]


def test_a_moved_clone_is_set_up_anew(bare: Path, tmp_path_factory: pytest.TempPathFactory):
    moved = tmp_path_factory.mktemp("moved") / "clone"
    shutil.copytree(bare, moved)
    assert stamps(bare)[0] != stamps(moved)[0]


def test_a_gpu_takes_the_pins_of_the_cuda_build_and_none_takes_the_cpu_build(bare: Path, tmp_path: Path):
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = tools / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: Toy'\n")
    fake.chmod(0o755)
    with_gpu = dry_run("setup", folder=bare, path=f"{tools}:{os.environ['PATH']}")
    fake.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    without = dry_run("setup", folder=bare, path=f"{tools}:{os.environ['PATH']}")
    assert "-c env/constraints.txt" in with_gpu
    assert "-c env/constraints-cpu.txt" in without


def test_torch_index_is_offered_to_pip(bare: Path):
    assert "--extra-index-url" not in dry_run("setup", folder=bare)
    plan = dry_run("setup", "TORCH_INDEX=https://example.org/cpu", folder=bare)
    assert '--extra-index-url "https://example.org/cpu"' in plan


def test_an_old_python_is_refused_with_a_message(bare: Path, tmp_path: Path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=bare, capture_output=True, text=True)
    assert done.returncode != 0
    assert "must be Python 3.11 or newer" in done.stderr


def test_jupyterlab_listens_here_only_and_keeps_its_token():
    plan = dry_run("lab")
    assert "--ip=127.0.0.1" in plan
    assert "/lab/tree/notebooks" in plan
    for weaker in ("token=''", "--IdentityProvider.token", "0.0.0.0", "--allow-root", "disable_check_xsrf", "password"):
        assert weaker not in plan
