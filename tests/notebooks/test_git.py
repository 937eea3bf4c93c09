"""A notebook that was run and saved is no change for git; an edited one is."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "notebooks/02_pretrain.ipynb"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with one notebook of the lab, as a clone holds it before `make setup`."""
    for name in (NOTEBOOK, ".gitattributes", "env/jupyter/strip_notebook.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def define_filter(clone: Path) -> None:
    """What `make setup` does, by its own line."""
    (line,) = re.findall(r"^\t@(git config filter\S+ \"[^\"]+\")", (ROOT / "Makefile").read_text(), re.MULTILINE)
    subprocess.run(["sh", "-c", line], cwd=clone, check=True)


def save_after_run_all(clone: Path, edit: str = "") -> None:
    """Save the notebook as JupyterLab does after "Run All"."""
    notebook = nbformat.read(clone / NOTEBOOK, 4)
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number
        cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
        cell.outputs = [nbformat.v4.new_output("stream", text="many\nlines\n" * 10)]
    notebook.cells[-1].source += edit
    notebook.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    notebook.metadata["language_info"]["version"] = "3.11.2"
    nbformat.write(notebook, clone / NOTEBOOK)


@pytest.fixture
def after_save() -> Any:
    """The hook of env/jupyter/jupyter_server_config.py, loaded as the server loads it."""
    path = ROOT / "env" / "jupyter" / "jupyter_server_config.py"
    spec = importlib.util.spec_from_file_location("server_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    config = SimpleNamespace(FileContentsManager=SimpleNamespace())
    module.__dict__["get_config"] = lambda: config
    spec.loader.exec_module(module)
    return config.FileContentsManager.post_save_hook


def test_a_saved_run_is_no_change_and_an_edit_is_one(clone: Path, after_save: Any):
    define_filter(clone)
    save_after_run_all(clone)
    assert git(clone, "diff", "--stat") == ""
    after_save(model={"type": "notebook"}, os_path=str(clone / NOTEBOOK), contents_manager=None)
    assert git(clone, "status", "--porcelain") == ""
    save_after_run_all(clone, edit="\n# edited")
    after_save(model={"type": "notebook"}, os_path=str(clone / NOTEBOOK), contents_manager=None)
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOK}\n", "an edit is neither hidden nor staged"
    assert "many" not in git(clone, "diff") and "# edited" in git(clone, "diff")


def test_a_notebook_that_git_does_not_know_stays_unknown(clone: Path, after_save: Any):
    define_filter(clone)
    own = clone / "notebooks" / "own.ipynb"
    shutil.copy(clone / NOTEBOOK, own)
    after_save(model={"type": "notebook"}, os_path=str(own), contents_manager=None)
    assert git(clone, "status", "--porcelain") == "?? notebooks/own.ipynb\n"


def test_a_clone_without_the_filter_works(clone: Path):
    save_after_run_all(clone)
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOK}\n"
    git(clone, "commit", "-q", "-a", "-m", "second")
    assert git(clone, "status", "--porcelain") == ""


def test_every_committed_notebook_is_as_the_filter_leaves_it():
    before = {path: path.read_bytes() for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(before) >= 9
    script = ["python3", str(ROOT / "env" / "jupyter" / "strip_notebook.py")]
    for path, text in before.items():
        assert subprocess.run(script, input=text, capture_output=True, check=True).stdout == text, path.name


def test_what_is_no_notebook_passes_the_filter_unchanged():
    script = ["python3", str(ROOT / "env" / "jupyter" / "strip_notebook.py")]
    for text in (b"{}", b"not json\n", b'{"cells": 3}'):
        assert subprocess.run(script, input=text, capture_output=True, check=True).stdout == text
