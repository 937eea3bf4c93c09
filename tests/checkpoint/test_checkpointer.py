"""The checkpointer beside the steps: a save is a copy of its moment, committed in order, its failure told once."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylab.checkpoint import checkpointer as module
from tinylab.checkpoint.checkpointer import Checkpointer
from tinylab.checkpoint.state import TrainState
from tinylab.checkpoint.store import latest_good
from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Saving, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.dist.context import Context
from tinylab.errors import CheckpointError
from tinylab.optim.build import KINDS, parameter_groups
from tinylab.runs import sealed_log
from tinylab.runs.folder import Run

CONFIG = RunConfig(
    model=Model(vocab_size=20, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=16, seq_len=8),
    data=Data(sources=(Source(name="a", corpus="files:a.txt"),), vocab_size=20),
    stages=(Stage(name="one", tokens=40 * 8, batch_tokens=8),),
    schedule=Schedule(warmup_tokens=8),
    saving=Saving(every_tokens=8, early=False, keep=2),
)
CONTEXT = Context(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", (0.001, 0.001))


@pytest.fixture
def shards(tmp_path: Path) -> Any:
    """What a save needs of the data: a tokenizer folder and its ids."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    ids = {"bos_id": 1, "eos_id": 2, "hash": "h", "boundary": "eos"}
    return SimpleNamespace(
        tokenizer_path=tmp_path / "tokenizer", manifest={"tokenizer": ids}, fingerprint="f" * 64, vocab_size=20
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create(CONFIG, {})
    return run


@pytest.fixture
def checkpointer(run: Run, shards: Any) -> Iterator[Checkpointer]:
    with Checkpointer(run, CONFIG, CONTEXT, shards, None) as found:
        yield found


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Commits wait for this event."""
    event, commit = threading.Event(), module.commit_checkpoint

    def commit_later(*arguments: Any) -> Path:
        assert event.wait(20)
        return commit(*arguments)

    monkeypatch.setattr(module, "commit_checkpoint", commit_later)
    return event


def advance(state: TrainState) -> None:
    """One step with a gradient of ones."""
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step += 1


def tensors_of(state: TrainState) -> list[torch.Tensor]:
    parameters = list(state.model.parameters())
    moments = [state.optimizer.state[p]["exp_avg"] for p in parameters]
    return [t.detach().clone() for t in (*parameters, *moments)]


def test_a_checkpoint_is_the_state_at_its_save_while_steps_continue(
    checkpointer: Checkpointer, run: Run, shards: Any, held: threading.Event
):
    state = checkpointer.resume()
    advance(state)
    saved, generator = tensors_of(state), torch.get_rng_state()
    checkpointer.save(state)
    assert checkpointer.poll() == [] and checkpointer.saved_step == 1
    advance(state)
    torch.rand(3)
    held.set()
    assert [p.name for p in checkpointer.close()] == ["step-00000001"]
    with Checkpointer(run, CONFIG, CONTEXT, shards, latest_good(run)[0]) as second:
        resumed = second.resume()
    assert resumed.step == second.saved_step == 1
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(resumed), saved, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_save_waits_for_the_one_before_it(checkpointer: Checkpointer, run: Run, held: threading.Event):
    state = checkpointer.resume()
    advance(state)
    checkpointer.save(state)
    threading.Timer(0.2, held.set).start()
    advance(state)
    checkpointer.save(state)
    assert held.is_set() and [p.name for p in run.checkpoints()][:1] == ["step-00000001"]
    assert [p.name for p in checkpointer.close()] == ["step-00000001", "step-00000002"]
    assert checkpointer.poll() == [], "each checkpoint is reported once"


@pytest.mark.parametrize("where", ["poll", "save", "close"])
def test_a_save_that_failed_is_raised_at_the_next_call(where: str, checkpointer: Checkpointer, run: Run):
    state = checkpointer.resume()
    advance(state)
    shutil.rmtree(run.checkpoints_path)
    run.checkpoints_path.write_text("no folder")
    checkpointer.save(state)
    calls = {"poll": checkpointer.poll, "save": lambda: checkpointer.save(state), "close": checkpointer.close}
    checkpointer._worker.submit(lambda: None).result()
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000001"):
        calls[where]()
    lines = run.journal()
    assert [(x["event"], x["repeated"]) for x in lines] == 2 * [("save_failed", True)] + [("save_failed", False)]


def test_older_checkpoints_are_pruned_beside_the_steps(checkpointer: Checkpointer, run: Run):
    state = checkpointer.resume()
    for _ in range(4):
        advance(state)
        checkpointer.save(state)
    checkpointer.close()
    assert [p.name[-1] for p in run.checkpoints()] == ["3", "4"]


def test_the_lines_of_the_covered_steps_reach_the_device_before_the_commit(
    checkpointer: Checkpointer, run: Run, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    commit = module.commit_checkpoint
    monkeypatch.setattr(sealed_log, "fsync_path", lambda path: events.append(str(path.relative_to(run.path))))
    monkeypatch.setattr(module, "commit_checkpoint", lambda *a: (events.append("commit"), commit(*a))[1])
    run.metrics_path.write_text('{"step": 1}\n')
    state = checkpointer.resume()
    advance(state)
    checkpointer.save(state)
    checkpointer.close()
    assert events == ["metrics.jsonl", "sealed/metrics.jsonl", "commit"]


def test_nothing_is_committed_into_a_folder_that_replaced_the_runs(run: Run, shards: Any, held: threading.Event):
    with run.lock(), Checkpointer(run, CONFIG, CONTEXT, shards, None) as checkpointer:
        state = checkpointer.resume()
        advance(state)
        checkpointer.save(state)
        shutil.move(run.path, run.path.with_name("moved"))
        run.create(CONFIG, {})
        (run.path / "lock").touch()
        held.set()
        with pytest.raises(CheckpointError, match="must stay where it is while it is trained"):
            checkpointer.close()
    assert run.checkpoints() == [] and not run.journal_path.exists()


def test_a_save_in_flight_is_committed_when_the_run_fails(run: Run, shards: Any, held: threading.Event):
    with pytest.raises(ZeroDivisionError), Checkpointer(run, CONFIG, CONTEXT, shards, None) as checkpointer:
        state = checkpointer.resume()
        advance(state)
        checkpointer.save(state)
        threading.Timer(0.2, held.set).start()
        raise ZeroDivisionError
    assert [line["event"] for line in run.journal()] == ["committed"]


def test_retention_that_is_off_removes_nothing(run: Run, shards: Any):
    config = replace(CONFIG, saving=replace(CONFIG.saving, keep=None))
    with Checkpointer(run, config, CONTEXT, shards, None) as checkpointer:
        state = checkpointer.resume()
        for _ in range(4):
            advance(state)
            checkpointer.save(state)
        checkpointer.close()
    assert len(run.checkpoints()) == 4


def fail(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next commits fail, so many of them."""
    commit, left = module.commit_checkpoint, iter(range(times))

    def failing(*arguments: Any) -> Path:
        if next(left, None) is not None:
            raise CheckpointError("cannot write: no space left")
        return commit(*arguments)

    monkeypatch.setattr(module, "commit_checkpoint", failing)


def test_a_save_that_failed_twice_is_committed_by_the_third_attempt(
    checkpointer: Checkpointer, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    fail(monkeypatch, 2)
    state = checkpointer.resume()
    advance(state)
    checkpointer.save(state)
    assert [p.name for p in checkpointer.close()] == ["step-00000001"]
    assert [line["event"] for line in run.journal()] == ["save_failed", "save_failed", "committed"]
    assert (
        "warning: the checkpoint of step 1 failed, it is tried again: cannot write: no space" in capsys.readouterr().err
    )


def test_a_run_that_goes_on_without_a_checkpoint_still_needs_its_last_one(
    run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch
):
    config = replace(CONFIG, saving=replace(CONFIG.saving, on_error="continue"))
    with Checkpointer(run, config, CONTEXT, shards, None) as checkpointer:
        state = checkpointer.resume()
        fail(monkeypatch, 3)
        advance(state)
        checkpointer.save(state)
        checkpointer._worker.submit(lambda: None).result()
        assert checkpointer.poll() == [] and not checkpointer.failed
        advance(state)
        checkpointer.save(state)
        assert [p.name for p in checkpointer.close()] == ["step-00000002"]
        fail(monkeypatch, 3)
        advance(state)
        checkpointer.save(state)
        with pytest.raises(CheckpointError, match="no space left"):
            checkpointer.close()


def test_the_journal_says_how_long_the_steps_waited(checkpointer: Checkpointer, run: Run):
    state = checkpointer.resume()
    advance(state)
    checkpointer.save(state)
    checkpointer.close()
    assert [0 < line["blocked_s"] < 60 for line in run.journal()] == [True]


def test_memory_for_the_snapshot_is_taken_once(checkpointer: Checkpointer):
    state = checkpointer.resume()
    places = []
    for _ in range(2):
        advance(state)
        checkpointer.save(state)
        checkpointer.close()
        places.append({name: buffer.data_ptr() for name, buffer in checkpointer._memory._buffers.items()})
    assert places[0] == places[1] and len(places[0]) == 4 * len(list(state.model.parameters()))


def test_an_optimizer_without_state_resumes(run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        KINDS, "adamw", lambda model, _: torch.optim.SGD(parameter_groups(model, CONFIG.optimizer), 0.1)
    )
    with Checkpointer(run, CONFIG, CONTEXT, shards, None) as checkpointer:
        state = checkpointer.resume()
        advance(state)
        checkpointer.save(state)
        folder = checkpointer.close()[0]
    with Checkpointer(run, CONFIG, CONTEXT, shards, folder) as second:
        resumed = second.resume()
    assert resumed.step == 1 and resumed.optimizer.state_dict()["state"] == {}
    for a, b in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", ["recorded", "unknown"])
def test_moments_that_are_missing_are_named(count: str, checkpointer: Checkpointer, run: Run, shards: Any):
    """Also in a checkpoint of a version that did not write their number down."""
    state = checkpointer.resume()
    advance(state)
    checkpointer.save(state)
    folder = checkpointer.close()[0]
    path = folder / "trainer" / "optimizer.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.startswith("norm.weight")}, path)
    if count == "unknown":
        record = json.loads((folder / "trainer" / "trainer.json").read_text())
        del record["optimizer_tensors"]
        (folder / "trainer" / "trainer.json").write_text(json.dumps(record))
    with (
        Checkpointer(run, CONFIG, CONTEXT, shards, folder) as second,
        pytest.raises(
            CheckpointError, match=r"must hold the moments of every parameter; without moments: norm.weight;"
        ),
    ):
        second.resume()
