"""The live monitor reads the run folder only: from its last byte, torn lines later, cut lines again."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tinylab.runs.folder import Run
from tinylab.widgets import Monitor


def line(step: int, loss: float = 5.0) -> str:
    record = {"step": step, "tokens": 10 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "stage": "a"}
    return json.dumps(record | {"tokens_per_s": 100.0, "step_time_s": 0.1, "peak_memory_gib": 0.1}) + "\n"


def test_a_torn_line_waits_for_its_newline_and_nothing_is_read_twice(tmp_path: Path):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    monitor = Monitor(run)
    assert monitor.read() == []
    whole = line(1) + line(2)
    run.metrics_path.write_text(whole[:-5])
    assert [r["step"] for r in monitor.read()] == [1]
    with open(run.metrics_path, "a") as file:
        file.write(whole[-5:] + line(3))
    assert [r["step"] for r in monitor.read()] == [1, 2, 3]


def test_a_resume_that_cut_lines_is_read_again(tmp_path: Path):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    monitor = Monitor(run)
    run.metrics_path.write_text(line(1) + line(2) + line(3))
    monitor.read()
    run.metrics_path.write_text(line(1) + line(2, 4.0))
    assert [(r["step"], r["loss"]) for r in monitor.read()] == [(1, 5.0), (2, 4.0)]
    monitor.read()
    for loss in (3.0, 2.123456):  # lines of the same length; longer ones, so that the offset falls into one
        run.metrics_path.write_text(line(1) + line(2, loss) + line(3, loss) + line(4, loss))
        assert [r["loss"] for r in monitor.read()] == [5.0, loss, loss, loss]
    run.metrics_path.unlink()
    assert monitor.read() == []


def test_the_static_twin_says_what_the_run_says(lab: Path):
    view = Monitor("tiny").static()
    last = Run("tiny").metric_records()[-1]
    assert f"{last['loss']:.3f} nats per token" in view.html and "24 of 24" in view.html
    assert view.html.count("<img") == 1 and "state: done" in repr(view)


def test_a_live_view_updates_one_output_and_ends_with_its_block(lab: Path, monkeypatch):
    import IPython.display

    shown: list[str] = []

    class Handle:
        def update(self, view) -> None:
            shown.append(repr(view))

    monkeypatch.setattr(IPython.display, "display", lambda view, display_id: shown.append(repr(view)) or Handle())
    with Monitor("tiny") as monitor:
        thread = monitor._thread
        deadline = time.monotonic() + 30
        while len(shown) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not thread.is_alive() and len(shown) >= 3 and "tiny" in shown[-1]


def test_an_error_becomes_a_sentence_in_the_view(tmp_path: Path, monkeypatch):
    import IPython.display

    run = Run(tmp_path / "r")
    run.path.mkdir()
    run.metrics_path.write_text("not json\n")
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda view, display_id: shown.append(view))
    Monitor(run).show()
    assert "failed" in shown[0].html and "must be a JSON object" in shown[0].html
