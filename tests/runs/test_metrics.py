"""One line per step in `metrics.jsonl`, also after a kill and a resume from an earlier step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinylab.runs.durable import read_lines
from tinylab.runs.metrics import UNITS, MetricsLog


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.append({"step": step, "loss": 1 / 3 + step})
    log.sync()
    return log


def test_floats_come_back_bit_for_bit(log: MetricsLog):
    assert read_lines(log.path)[0] == [{"step": s, "loss": 1 / 3 + s} for s in range(1, 6)]


@pytest.mark.parametrize("step", [0, 1, 3, 5, 9])
def test_cutting_after_a_step_drops_later_lines_and_keeps_earlier_bytes(log: MetricsLog, step):
    lines = log.path.read_bytes().splitlines(keepends=True)
    with open(log.path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    dropped = log.cut_after(step)
    assert [r["step"] for r in dropped] == list(range(step + 1, 6))
    assert log.path.read_bytes() == b"".join(lines[:step])
    log.append({"step": step + 1})
    assert log.path.read_bytes().count(b"\n") == min(step, 5) + 1


def test_cutting_a_log_that_does_not_exist_drops_nothing(tmp_path: Path):
    log = MetricsLog(tmp_path / "none.jsonl")
    assert log.cut_after(3) == []
    log.sync()
    assert not log.path.exists()


def test_a_metric_without_a_unit_is_a_defect(log: MetricsLog):
    with pytest.raises(AssertionError, match=r"unknown metrics: {'speed'}"):
        log.append({"step": 6, "speed": 1.0})


def test_every_metric_of_the_contract_has_a_unit():
    contract = "step tokens loss lr grad_norm stage step_time_s data_wait_s data_hash tokens_per_s mfu peak_memory_gib"
    assert {*contract.split(), "validation_loss", "bits_per_byte"} <= set(UNITS)
