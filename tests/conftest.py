"""Fixtures of the whole test tree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest_plugins = ["goals"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of shared evaluation items, books and tokenizers; skips where there is none."""
    path = Path(os.environ.get("TINYLAB_SHARED") or ROOT.parent / "shared") / "data"
    if not path.is_dir():
        pytest.skip(f"no shared test data at {path} (set TINYLAB_SHARED)")
    return path


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the finished run `tiny` in it: 24 steps of a 0.2M model on a little real text, scored."""
    from tinylab.config.io import override
    from tinylab.config.presets import preset
    from tinylab.evaluation.evaluate import evaluate
    from tinylab.runs.folder import Run
    from tinylab.training.loop import train

    changes = ["data.sources.prose.limit_mb=0.5", "data.sources.code.limit_mb=0.3", "data.validation_fraction=0.1"]
    changes += ["data.vocab_size=1024", "model.vocab_size=1024", "model.n_layer=2", "model.d_model=64"]
    changes += ["model.n_head=4", "model.d_ff=128", "model.seq_len=64", "stages.0.batch_tokens=1024"]
    changes += ["saving.every_tokens=8192", "validation.every_tokens=8192", "validation.sequences=16"]
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLAB_HOME", str(home))
        run = train(override(preset("tiny", 24_576), [*changes, "parallel.threads=1"]), Run("tiny"), progress=False)
        evaluate(str(run.checkpoints()[2]), limit=20, progress=False)
        evaluate(str(run.checkpoints()[-1]), limit=20, progress=False)
    return home


@pytest.fixture
def lab(trained_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `trained_home` for one test, as its home folder."""
    home = shutil.copytree(trained_home, tmp_path / "lab")
    monkeypatch.setenv("TINYLAB_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own for every test: nothing is read from or left in the checkout."""
    home = tmp_path / "home"
    monkeypatch.setenv("TINYLAB_HOME", str(home))
    return home
