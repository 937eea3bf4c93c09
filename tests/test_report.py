"""The report: one file, every figure in it, nothing loaded, everything escaped."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path

import pytest

from tinylab.errors import CheckpointError, ConfigError, NothingFoundError
from tinylab.report import write_report
from tinylab.runs.folder import Run


def test_a_report_has_its_figures_and_numbers_inside_and_loads_nothing(lab: Path):
    run = Run("tiny")
    out = write_report([run], lab / "r.html", title="A <b> & $c$")
    html = out.read_text(encoding="utf-8")
    assert len(re.findall(r'<img alt="[^"]+" [^>]*src="data:image/png;base64,', html)) == html.count("<img") >= 8
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "default-src 'none'" in html and "<script" not in html
    assert "A &#60;b&#62; &#38; &#36;c&#36;" in html
    measured = [r["validation_loss"] for r in run.metric_records() if r.get("validation_loss") is not None]
    assert f"{measured[0]:.2f} to {measured[-1]:.2f} nats" in html
    speeds = [r["tokens_per_s"] for r in run.metric_records()[1:]]
    assert f">{round(statistics.median_high(speeds)):,}</td>" in html
    assert "batch&#95;tokens = 1024" in html and "Prepared data, fingerprint" in html and "committed" in html


def test_two_runs_are_overlaid_and_data_that_are_gone_are_named(lab: Path):
    shutil.copytree(lab / "runs" / "tiny", lab / "runs" / "other")
    shutil.rmtree(lab / "data")
    html = write_report(["tiny", "other"], lab / "r.html").read_text(encoding="utf-8")
    assert "Report on tiny, other" in html and html.count("manifest.json") >= 2


def test_a_run_without_steps_or_scores_still_has_a_report(lab: Path):
    run = Run("fresh")
    run.create(Run("tiny").config, {"<i>": "</table><script>"})
    html = write_report([run], lab / "r.html").read_text(encoding="utf-8")
    assert "no steps" not in html and html.count("<img") >= 5 and "<script" not in html


def test_what_cannot_be_reported_is_said(lab: Path, tmp_path: Path):
    with pytest.raises(NothingFoundError, match="must hold a run"):
        write_report(["nowhere"], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(ConfigError, match="a file to write"):
        write_report(["tiny"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(["tiny"], tmp_path / "file" / "r.html")
