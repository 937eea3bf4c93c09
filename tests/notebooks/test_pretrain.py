"""Notebook 02 refuses what a run cannot become, and a stop is no error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.config.schema import RunConfig
from tinylab.config.stages import Stage
from tinylab.dist.handle import Handle
from tinylab.errors import ConfigError, RunStopped
from tinylab.notebook.pretrain import continue_run, planned
from tinylab.runs.folder import Run


@pytest.fixture
def endless(lab: Path) -> RunConfig:
    """The run of the lab, long enough to be stopped."""
    tiny = Run("tiny").config
    return replace(tiny, stages=(Stage(name="long", tokens=2**24, batch_tokens=tiny.stages[0].batch_tokens),))


@contextmanager
def stopped_after_a_step(run: Run) -> Iterator[None]:
    """Stop the run from another thread once it has done a step more, at the latest after the block."""
    before, ended = len(run.metric_records()), threading.Event()

    def stop() -> None:
        while len(run.metric_records()) <= before and not ended.wait(0.1):
            pass
        Handle(run).stop()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"preset": "demo"}, "preset = demo"),
        ({"tokens": 1_000_000}, "tokens = 1000000"),
        ({"limit_mb": 7.0, "preset": "tiny"}, "limit_mb = 7.0"),
    ],
)
def test_what_differs_from_the_run_that_is_there_is_refused_by_name(lab: Path, asked: dict, named: str):
    with pytest.raises(ConfigError, match=rf"preset tiny over 24.6K tokens, .*asked for: {named}\. Leave"):
        planned("tiny", **asked)


def test_what_equals_the_run_that_is_there_continues_it(lab: Path):
    run = Run("tiny")
    assert planned(run) == planned(run, "tiny", run.config.tokens) == run.config


def test_a_new_run_takes_what_is_given():
    config = planned("new", "tiny", 1_000_000, 0.5)
    assert config.tokens >= 1_000_000 and {s.limit_mb for s in config.data.sources} == {0.5}
    assert 200_000 <= planned("new").tokens < 210_000


def test_a_stopped_run_is_one_sentence_and_resumes(endless: RunConfig, capsys: pytest.CaptureFixture):
    run = Run("long")
    with stopped_after_a_step(run):
        assert continue_run(run, endless, "process") == "started"
    step = run.status()["step"]
    assert f"long was stopped at step {step} of 16384; run this notebook again to resume it" in capsys.readouterr().out
    with stopped_after_a_step(run):
        assert continue_run(run, planned(run), "process") == "resumed"
    assert continue_run(run, endless, "stop") == "stopped"


def test_under_papermill_a_stopped_run_ends_the_notebook_with_143(endless: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINYLAB_EXECUTOR", "papermill")
    run = Run("long")
    with stopped_after_a_step(run), pytest.raises(RunStopped, match="long was stopped at step") as caught:
        continue_run(run, endless, "process")
    assert caught.value.exit_code == 128 + signal.SIGTERM
