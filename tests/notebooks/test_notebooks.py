"""Every notebook of the lab: its structure by rule, and a run of it at tiny size, offline, judged by its result."""

from __future__ import annotations

import ast
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from papermill import inspect_notebook

from tinylab.checkpoint.retention import early_steps
from tinylab.config import presets
from tinylab.demo import demo
from tinylab.errors import ConfigError, NothingFoundError
from tinylab.notebook.run import list_notebooks, notebook_parameters, run_notebook
from tinylab.runs.folder import Run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in list_notebooks()}
EXPECTED = (
    "00_doctor_and_tour",
    "01_data_and_tokens",
    "02_pretrain",
    "03_loss_curves",
    "05_score_trajectories",
    "06_compare_checkpoints",
    "09_scaling",
    "10_report",
)
SCREEN = 40
"""Lines of a code cell that fit on a screen."""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS[name], 4)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def execute(name: str, folder: Path, **parameters: object) -> dict:
    """Run a notebook; its result, after checks that hold for every executed notebook."""
    out = run_notebook(NOTEBOOKS[name], folder / f"{name}.ipynb", parameters)
    executed = nbformat.read(out, 4)
    nbformat.validate(executed)
    text = out.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    streams = [
        o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "stream" and o.name == "stderr"
    ]
    assert not any("Warning" in stream.text for stream in streams), streams
    return json.loads((folder / f"{name}.result.json").read_text(encoding="utf-8"))


def pictures(path: Path) -> int:
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


def test_all_notebooks_are_there():
    assert set(EXPECTED) <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_structure(name: str):
    notebook, cells = read(name), read(name).cells
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"name": "tinylab", "display_name": "tinylab", "language": "python"}
    assert len({cell.id for cell in cells}) == len(cells)
    first = cells[0].source
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\?\n", first), "the title is a question"
    assert all(word in first for word in ("**Needs**", "**Writes**", "**Takes**", "CPU", "GPU"))
    imports, parameters = cells[1], cells[2]
    assert all(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(imports.source).body), "only imports"
    assert parameters.metadata.tags == ["parameters"]
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    shown = inspect_notebook(str(NOTEBOOKS[name])).values()
    assert all(p["help"] for p in shown), "each parameter has meaning and unit"
    assert "write_result" in cells[-1].source and f'"{name}"' in cells[-1].source
    for cell in code_cells(name):
        assert not cell.outputs and cell.execution_count is None, "no outputs in git"
        assert len(cell.source.splitlines()) <= SCREEN
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.While | ast.For | ast.Try)
        assert not re.search(r"^[!%]|pip install|https?://|/home/|/root/|/Users/", cell.source, re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_acting_cell_has_a_sentence_before_it_or_shows_a_figure(name: str):
    cells = read(name).cells
    for before, cell in pairwise(cells[2:]):
        if cell.cell_type == "code" and before.cell_type == "code":
            assert re.search(r"figures\[|plots\.|show_table", cell.source), cell.source


def test_00_shows_what_works_here(lab: Path, tmp_path: Path):
    result = execute("00_doctor_and_tour", tmp_path / "out", device="cpu")
    assert result["device"] == "cpu" and result["runs"] == ["tiny"]
    assert {f["check"] for f in result["findings"]} >= {"python", "torch"}
    sizes = {p["preset"]: p["parameters"] for p in result["presets"]}
    assert sizes["tinyllama_1b"] == 1_100_048_384  # TinyLlama/TinyLlama_v1.1, model.safetensors


def test_01_shows_the_data_of_a_run(lab: Path, tmp_path: Path):
    result = execute("01_data_and_tokens", tmp_path / "out", run="tiny", step=3)
    assert result["samples"] == 16 and result["audit"]["problems"] == []
    assert all(e["rest_tokens"] < 256 for split in result["audit"]["splits"].values() for e in split.values())
    assert {row["source"] for row in result["table"]} == {"prose", "code"}
    assert pictures(tmp_path / "out" / "01_data_and_tokens.ipynb") == 3


def test_01_shows_any_folder_of_text(lab: Path, tmp_path: Path):
    corpus = f"files:{Path(json.__file__).parent.parent}/[a-d]*.py"
    result = execute("01_data_and_tokens", tmp_path / "out", run="tiny", corpus=corpus, limit_mb=0.5)
    assert {row["source"] for row in result["table"]} == {"own"} and result["audit"]["problems"] == []
    assert sum(row["bytes"] for row in result["table"]) == pytest.approx(5e5, rel=0.01)


def test_02_starts_then_shows_finished_and_prepares_nothing_twice(lab: Path, tmp_path: Path):
    import shutil

    tiny = Run("tiny")
    config = tiny.config_path.read_text()
    fresh = Run("again")
    fresh.create(tiny.config, {})
    first = execute("02_pretrain", tmp_path / "out", run="again")
    assert (first["action"], first["state"], first["step"]) == ("started", "done", 24)
    ours = {k: v for k, v in fresh.metric_records()[-1].items() if k in ("loss", "data_hash", "tokens")}
    assert ours.items() <= tiny.metric_records()[-1].items()
    before = fresh.metrics_path.read_bytes()
    second = execute("02_pretrain", tmp_path / "out", run="again")
    assert second["action"] == "finished" and fresh.metrics_path.read_bytes() == before
    assert second["loss"] == first["loss"] and fresh.config_path.read_text() == config
    shutil.rmtree(fresh.checkpoints()[-1])
    fresh.write_status("stopped", 16)
    third = execute("02_pretrain", tmp_path / "out", run="again")
    assert third["action"] == "resumed" and third["loss"] == first["loss"]


def test_02_refuses_an_unknown_mode_and_a_run_that_nobody_started(lab: Path, tmp_path: Path):
    with pytest.raises(
        ConfigError, match="mode must be one of auto, process, torchrun, slurm, watch, stop; found 'torch'"
    ):
        execute("02_pretrain", tmp_path / "out", run="new", mode="torch")
    with pytest.raises(NothingFoundError, match="must hold a run"):
        execute("02_pretrain", tmp_path / "out", run="new", mode="watch")
    errors = [o for c in nbformat.read(tmp_path / "out" / "02_pretrain.ipynb", 4).cells for o in c.get("outputs", [])]
    assert [o.traceback for o in errors if o.output_type == "error"] == [
        [f"{Run('new').path} must hold a run (config.toml); found none. Start one: tinylab train {Run('new').path}"]
    ], "one sentence and no traceback"


def test_the_views_open_by_default_on_what_make_demo_leaves():
    """A newcomer runs all cells of them right after it."""
    names = ("03_loss_curves", "05_score_trajectories", "06_compare_checkpoints", "10_report")
    defaults = {name: {k: p.default for k, p in notebook_parameters(NOTEBOOKS[name]).items()} for name in names}
    left = inspect.signature(demo).parameters["run"].default
    assert defaults["03_loss_curves"]["runs"] == defaults["10_report"]["runs"] == [left]
    assert defaults["05_score_trajectories"]["store"] == defaults["06_compare_checkpoints"]["b"] == left
    run, _, step = defaults["06_compare_checkpoints"]["a"].partition("@")
    assert run == left and int(step) in early_steps(presets.preset("demo"))


def test_03_names_the_jumps_and_their_documents(lab: Path, tmp_path: Path):
    result = execute("03_loss_curves", tmp_path / "out", runs=["tiny"])
    assert result["loss"]["tiny"] == Run("tiny").metric_records()[-1]["loss"]
    assert result["traced_samples"] == 16 and pictures(tmp_path / "out" / "03_loss_curves.ipynb") == 5


def test_05_puts_the_run_beside_what_was_published(lab: Path, tmp_path: Path):
    result = execute("05_score_trajectories", tmp_path / "out", store="tiny")
    assert all(len(ends) == 2 and ends[0]["tokens"] < ends[1]["tokens"] for ends in result["tasks"].values())
    mean = result["mean_moved_by"][-1]
    assert mean["task"] == "mean" and mean["change"] == pytest.approx(-0.89, abs=0.01)  # 53.86 to 52.97
    assert result["mean_moved_by"][0]["task"] == "boolq"
    assert {"boolq"} == {r["task"] for r in result["published_significant"] if r["to"] == "1431k"}


def test_06_compares_two_checkpoints(lab: Path, tmp_path: Path):
    result = execute("06_compare_checkpoints", tmp_path / "out", a="tiny@4", b="tiny", max_new_tokens=5)
    assert result["a"] == "tiny@4" and result["b"] == "tiny@24"
    assert result["loss_b"] < result["loss_a"] and len(result["generations"]) == 3 and result["scores"]
    text = (tmp_path / "out" / "06_compare_checkpoints.ipynb").read_text(encoding="utf-8")
    assert pictures(tmp_path / "out" / "06_compare_checkpoints.ipynb") == 4 and "widget-view" not in text


def test_09_measures_what_can_run_here_and_plans_the_long_run(tmp_path: Path):
    given = {
        "ranks": [1, 3],
        "strategies": ["ddp"],
        "micro_batches": [16],
        "steps": 7,
        "device": "cpu",
        "limit_mb": 1.0,
    }
    result = execute("09_scaling", tmp_path / "out", **given)
    one, three = result["layouts"]
    assert result["fastest"] == one and one["tokens_per_s"] > 0 and one["ratio"] == 1
    assert "the number of ranks (3) must divide the sequences of a step (16)" in three["refused"]
    assert result["own_days"] == pytest.approx(presets.preset("tiny").tokens / one["tokens_per_s"] / 86400)
    assert result["planned"]["days"] == pytest.approx(3e12 / (16 * 24_000 * 86400), rel=1e-4)  # TinyLlama: 90 days
    assert result["found"].startswith("1 of 2 layouts ran.") and "takes 90.4 days on 16 ×" in result["found"]
    assert pictures(tmp_path / "out" / "09_scaling.ipynb") == 1


def test_10_writes_one_file_beside_its_result(lab: Path, tmp_path: Path):
    result = execute("10_report", tmp_path / "out", runs=["tiny"], title="A title")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert result["figures"] == html.count("<img ") >= 8 and "<h1>A title</h1>" in html


def test_a_missing_run_ends_with_nothing_found(tmp_path: Path):
    with pytest.raises(NothingFoundError, match="must hold a run"):
        execute("03_loss_curves", tmp_path / "out", runs=["nowhere"])
