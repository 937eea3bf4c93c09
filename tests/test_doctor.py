"""The doctor names each problem with a remedy, and fails only for what tinylab needs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinylab import doctor as examined
from tinylab.cli.command import main
from tinylab.doctor import doctor


def findings(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {f["check"]: f for f in report["findings"]}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """One real examination of this machine."""
    return doctor("cpu")


def test_this_machine_is_healthy_on_its_cpu(report: dict[str, Any]):
    problems = [f for f in report["findings"] if f["state"] == "problem"]
    assert problems == []
    assert report["healthy"]


def test_the_trial_ran_and_an_attention_backend_is_live(report: dict[str, Any]):
    found = findings(report)
    assert "gradients finite" in found["forward/backward"]["found"]
    assert "math" in found["attention"]["found"]
    assert found["corpus local:prose"]["state"] == found["corpus local:code"]["state"] == "ok"


def test_every_backend_that_is_not_live_says_why(report: dict[str, Any]):
    missing = [f for check, f in findings(report).items() if check.startswith("attention ")]
    assert missing, "some backend needs a GPU"
    assert all(f["state"] == "note" and f["found"] for f in missing)


def test_every_problem_has_a_remedy(report: dict[str, Any]):
    assert [f for f in report["findings"] if f["state"] == "problem" and not f["remedy"]] == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trials of model and corpus."""
    for name in ("_precision", "_attention", "_forward_backward", "_corpus"):
        monkeypatch.setattr(examined, name, lambda _: iter(()))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("package", "version", "floor"),
    [("torch", "2.10.1+cpu", "2.11"), ("jupyter-server", "2.17.9", "2.18.0"), ("transformers", "5.2.0", "5.3")],
)
def test_a_version_below_its_floor_is_a_problem(
    package: str, version: str, floor: str, monkeypatch: pytest.MonkeyPatch
):
    true_version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else true_version(name))
    report = doctor("cpu")
    found = findings(report)[package]
    assert not report["healthy"]
    assert f"{version}; must be at least {floor}" in found["found"]
    assert f"{package}>={floor}" in found["remedy"]


@pytest.mark.usefixtures("quick")
def test_a_missing_package_is_a_problem_that_names_it(monkeypatch: pytest.MonkeyPatch):
    true_version = importlib.metadata.version

    def version(name: str) -> str:
        if name == "papermill":
            raise importlib.metadata.PackageNotFoundError(name)
        return true_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "missing: papermill" in findings(doctor("cpu"))["packages"]["found"]


@pytest.mark.usefixtures("quick")
def test_unpickling_forced_on_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(examined.UNSAFE_LOAD, "1")
    found = findings(doctor("cpu"))["unpickling"]
    assert found["state"] == "problem"
    assert found["remedy"] == f"unset {examined.UNSAFE_LOAD}"


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_a_problem_and_names_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    found = findings(doctor("cpu"))["disk"]
    assert found["state"] == "problem"
    assert "0.1 GB free" in found["found"]
    assert "TINYLAB_HOME" in found["remedy"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "state"), [("a_file/lab", "problem"), ("x" * 300, "ok")], ids=["file", "long"])
def test_a_home_that_cannot_be_looked_at_does_not_end_the_examination(
    name: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("TINYLAB_HOME", str(tmp_path / name))
    assert findings(doctor("cpu"))["disk"]["state"] == state


@pytest.mark.usefixtures("quick")
def test_too_little_memory_is_a_problem_and_names_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(examined, "MEMORY_GB", 1e6)
    found = findings(doctor("cpu"))["memory"]
    assert found["state"] == "problem"
    assert "--set parallel.micro_batch=" in found["remedy"]


def test_a_fresh_model_with_a_wrong_loss_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    from torch import nn

    from tinylab.model.transformer import Llama

    def too_large(model: Llama, seed: int) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter)

    monkeypatch.setattr(Llama, "init_weights", too_large)
    (found,) = examined._forward_backward("cpu")
    assert found.state == "problem"
    assert "tinylab doctor --json" in found.remedy


@pytest.mark.usefixtures("quick")
def test_a_missing_browser_is_only_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    report = doctor("cpu")
    assert findings(report)["chromium"]["state"] == "note"
    assert report["healthy"]


def test_a_check_that_raises_is_a_problem_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken(_: str) -> Any:
        raise RuntimeError("no such instruction")

    broken.__name__ = "_attention"
    for name in ("_precision", "_forward_backward", "_corpus"):
        monkeypatch.setattr(examined, name, lambda _: iter(()))
    monkeypatch.setattr(examined, "_attention", broken)
    report = doctor("cpu")
    assert findings(report)["attention"]["found"] == "RuntimeError: no such instruction"
    assert not report["healthy"]
    assert "disk" in findings(report)


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("2.11", (2, 11)), ("5.3.0rc1", (5, 3, 0)), ("unknown", ())]
)
def test_versions_compare_as_numbers(version: str, numbers: tuple[int, ...]):
    assert examined._release(version) == numbers


@pytest.mark.usefixtures("quick")
def test_the_verb_prints_remedies_and_fails_for_problems_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], private_home: Path
):
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "everything that tinylab needs works" in capsys.readouterr().out
    monkeypatch.setenv(examined.UNSAFE_LOAD, "1")
    assert main(["doctor", "--device", "cpu"]) == 1
    assert f"remedy: unset {examined.UNSAFE_LOAD}" in capsys.readouterr().out
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False
    assert not private_home.exists()
