"""The attention backend of a run is chosen once, said in its folder, and refused before the run begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.config.io import override
from tinylab.config.schema import RunConfig
from tinylab.dist.context import Context
from tinylab.model import attention_choice
from tinylab.model.attention import BACKENDS
from tinylab.runs.folder import Run
from tinylab.training import attention
from tinylab.training.attention import choose_backend, keep_choice
from tinylab.training.opening import FREE_KEYS

CPU = Context(device=torch.device("cpu"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Asks for `auto` as on CUDA: every call measures, and `math` is the fastest."""
    calls: list[Any] = []

    def choose(model: Any, parallel: Any, *args: Any, **more: Any) -> tuple[str, dict[str, float]]:
        if parallel.attention != "auto":
            return attention_choice.choose_attention(model, parallel, *args, **more)
        calls.append(model)
        return "math", {"math": 1.0, "flash": 2.0}

    monkeypatch.setattr(attention, "choose_attention", choose)
    return calls


def test_a_run_computes_with_the_backend_it_names_and_says_so(
    trainer: Any, reference: Run, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(tmp_path / "run")
    config = override(tiny_config, ["parallel.attention=math"])
    assert trainer.go(run.path, config, failpoint="step.logged:3").code != 0
    assert trainer.go(run.path, config).code == 0
    choice = json.loads(run.attention_path.read_text())
    assert (choice["name"], choice["asked"], choice["median_s"]) == ("math", "math", {})
    assert choice["device"] == "cpu" and choice["dtype"] == "float32" and choice["torch"] == torch.__version__
    assert choice["shape"] == [4, 4, 2, 32, 8] and choice["document_mask"] is False
    lines = [line for line in run.journal() if line["event"] == "attention"]
    assert [{k: v for k, v in line.items() if k not in ("event", "time")} for line in lines] == [choice]
    ours, theirs = ([r["loss"] for r in x.metric_records()] for x in (run, reference))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours != theirs, "another kernel sums in another order"


def test_a_cpu_run_that_names_no_backend_writes_no_choice(reference: Run):
    assert not reference.attention_path.exists()
    assert "attention" not in [line["event"] for line in reference.journal()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_backend_that_cannot_run_is_refused_before_the_run_begins(
    ranks: int, trainer: Any, tiny_config: RunConfig, tmp_path: Path
):
    run = Run(tmp_path / "run")
    ended = trainer.go(run.path, override(tiny_config, ["parallel.attention=cudnn"]), ranks=ranks)
    assert ended.code == 2 and not run.exists()
    refusal = 'ConfigError: parallel.attention = "cudnn" must be able to run on cpu in torch.float32'
    assert ended.stderr.count(refusal) == ranks


def test_the_backend_may_change_between_starts():
    assert "parallel.attention" in FREE_KEYS


def test_a_measured_choice_is_kept_and_measured_again_only_for_something_else(
    measured: list[Any], run: Run, tiny_config: RunConfig
):
    first = choose_backend(tiny_config, run, CPU)
    assert first["name"] == "math" and first["median_s"] == {"math": 1.0, "flash": 2.0}
    keep_choice(first, run)
    again = choose_backend(tiny_config, run, CPU)
    keep_choice(again, run)
    assert again == first and len(measured) == 1
    assert [line["event"] for line in run.journal()] == ["attention"]
    wider = replace(tiny_config, parallel=replace(tiny_config.parallel, micro_batch=8))
    assert choose_backend(wider, run, CPU)["shape"][0] == 8 and len(measured) == 2
    run.attention_path.write_text(json.dumps(first | {"torch": "1.0"}))
    assert choose_backend(tiny_config, run, CPU) == first and len(measured) == 3


def test_a_kept_choice_whose_backend_does_not_run_here_is_measured_again(
    measured: list[Any], run: Run, tiny_config: RunConfig
):
    first = choose_backend(tiny_config, run, CPU)
    run.attention_path.write_text(json.dumps(first | {"name": "cudnn"}))
    assert choose_backend(tiny_config, run, CPU) == first and len(measured) == 2


def test_other_ranks_take_the_choice_of_rank_0(
    measured: list[Any], run: Run, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Context, "sum_integers", lambda self, own: [own[0] + list(BACKENDS).index("flex")])
    other = choose_backend(tiny_config, run, replace(CPU, rank=1, world=2))
    assert other["name"] == "flex" and not measured
