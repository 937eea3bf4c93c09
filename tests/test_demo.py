"""The demo does every part once, leaves what the design names, and refuses a folder that holds another run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab import demo as demonstration
from tinylab.config import presets
from tinylab.config.schema import RunConfig
from tinylab.demo import demo
from tinylab.errors import ConfigError
from tinylab.runs.folder import Run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The demo with a very small model, corpus and length, and one notebook."""
    base = presets.demo()
    sources = tuple(replace(s, limit_mb=0.5) for s in base.data.sources)
    config = replace(
        presets.scale_tokens(base, 40_960),
        model=replace(base.model, vocab_size=1024, n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=64, seq_len=128),
        data=replace(base.data, sources=sources, vocab_size=1024, validation_fraction=0.25),
        saving=replace(base.saving, every_tokens=20_480, early=False),
        parallel=replace(base.parallel, threads=1, precision="fp32"),
        validation=replace(base.validation, every_tokens=20_480, sequences=4),
    )
    monkeypatch.setattr(presets, "preset", lambda name, tokens=None: config)
    monkeypatch.setattr(demonstration, "NOTEBOOKS", ("03_loss_curves",))
    return config


def test_the_whole_path_once_and_nothing_twice(
    small: RunConfig, private_home: Path, capsys: pytest.CaptureFixture[str]
):
    first = demo()
    run = Run("demo")
    assert run.path == private_home / "runs" / "demo"
    assert [p["part"] for p in first["parts"]] == ["data", "training", "scores", "notebooks", "report"]
    assert run.metric_records()[-1]["tokens"] == small.tokens
    assert first["results"]["validation_loss"]["last"] < first["results"]["validation_loss"]["first"]
    assert first["results"]["probes"], "some probe was scored"
    cells = json.loads((run.path / "notebooks" / "03_loss_curves.ipynb").read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert (run.path / "report.html").read_text().count("data:image/") >= 3
    assert all(Path(path).exists() for path in first["look"].values())

    kept = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.safetensors")} | {
        p: p.stat().st_mtime_ns for p in (run.metrics_path, run.path / "notebooks" / "03_loss_curves.ipynb")
    }
    second = demo()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert second["results"] == first["results"]
    assert "0 executed, 1 unchanged" in second["parts"][3]["what"]
    assert "1 executed, 0 unchanged" in demo(again=True)["parts"][3]["what"]


def test_a_folder_with_another_run_is_refused(small: RunConfig, private_home: Path):
    Run("demo").create(replace(small, seed=99), {})
    with pytest.raises(ConfigError, match=r"must have the demo's own configuration.*tinylab demo --run NAME"):
        demo()
