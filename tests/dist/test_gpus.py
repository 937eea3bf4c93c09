"""What a launch says about GPUs, with an nvidia-smi that answers from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinylab.dist.gpus import full_gpus

ANSWER = """0, GPU-aa, NVIDIA H100, 70000, 81559
1, GPU-bb, NVIDIA H100, 500, 81559
2, GPU-cc, NVIDIA GB10, [N/A], [N/A]
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "answer").write_text(ANSWER)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat '{tmp_path}/answer'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_a_gpu_that_others_fill_is_named_with_its_memory(smi: Path):
    (sentence,) = full_gpus()
    assert sentence.startswith("GPU 0 (NVIDIA H100) already has 70,000 of 81,559 MiB in use: the run may not fit.")


@pytest.mark.parametrize(("visible", "count"), [("0,1", 1), ("1", 0), ("GPU-aa", 1), ("GPU-bb", 0), ("", 0)])
def test_only_gpus_that_the_run_may_use_are_looked_at(
    smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(full_gpus()) == count


def test_nothing_is_said_where_nvidia_smi_fails_or_is_missing(smi: Path, monkeypatch: pytest.MonkeyPatch):
    smi.write_text("#!/bin/sh\necho failed\nexit 9\n")
    assert full_gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert full_gpus() == []
