"""Fixtures of the whole test tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of shared evaluation items, books and tokenizers; skips where there is none."""
    path = Path(os.environ.get("TINYLAB_SHARED") or ROOT.parent / "shared") / "data"
    if not path.is_dir():
        pytest.skip(f"no shared test data at {path} (set TINYLAB_SHARED)")
    return path


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own for every test: nothing is read from or left in the checkout."""
    home = tmp_path / "home"
    monkeypatch.setenv("TINYLAB_HOME", str(home))
    return home
