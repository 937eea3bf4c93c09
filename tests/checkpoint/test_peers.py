"""Two ranks write one checkpoint beside their steps: together, or not at all, and neither waits for ever."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from tinylab.checkpoint import checkpointer as module
from tinylab.checkpoint.checkpointer import Checkpointer
from tinylab.checkpoint.state import TrainState
from tinylab.checkpoint.store import latest_good
from tinylab.config.architecture import Model
from tinylab.config.schema import Data, RunConfig, Saving, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.dist.context import Context
from tinylab.errors import CheckpointError
from tinylab.runs.folder import Run

CONFIG = RunConfig(
    model=Model(vocab_size=20, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=16, seq_len=8),
    data=Data(sources=(Source(name="a", corpus="files:a.txt"),), vocab_size=20),
    stages=(Stage(name="one", tokens=40 * 8, batch_tokens=8),),
    schedule=Schedule(warmup_tokens=8),
    saving=Saving(every_tokens=8, early=False),
)
DEADLINE_S = 60.0


class Exchange:
    """What the ranks of a test bring to a collective, each from a thread of its own."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.values: list[Any] = [None] * world
        self.count = 0

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(DEADLINE_S)
        found = list(self.values)
        self.count += rank == 0
        self.barrier.wait(DEADLINE_S)
        return found


@dataclass(frozen=True, kw_only=True)
class ThreadContext(Context):
    """A rank that is a thread."""

    exchange: Exchange = field(default_factory=lambda: Exchange(2))

    def sum_integers(self, values: Any) -> list[int]:
        return [sum(column) for column in zip(*self.exchange.all(self.rank, list(values)), strict=True)]

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.exchange.all(self.rank, tensor)


class Pair:
    """Two ranks, each with its checkpointer and state; `both` calls a function on each at the same time."""

    def __init__(self, run: Run, config: RunConfig, shards: Any) -> None:
        self.exchange, store = Exchange(2), HashStore()
        contexts = [
            ThreadContext(device=torch.device("cpu"), rank=r, world=2, store=store, exchange=self.exchange)
            for r in range(2)
        ]
        self.checkpointers = [Checkpointer(run, config, context, shards, None) for context in contexts]
        self._threads = ThreadPoolExecutor(2)
        self.states: list[TrainState] = self.both(lambda rank: self.checkpointers[rank].resume())

    def both(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(rank)` gives or raises on each rank."""
        futures = [self._threads.submit(work, rank) for rank in range(2)]
        return [future.exception(DEADLINE_S) or future.result() for future in futures]

    def step_and_save(self) -> list[Any]:
        def work(rank: int) -> None:
            state = self.states[rank]
            for parameter in state.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            state.optimizer.step()
            state.step += 1
            self.checkpointers[rank].save(state)

        return self.both(work)

    def close(self) -> list[Any]:
        return self.both(lambda rank: self.checkpointers[rank].close())

    def leave(self) -> None:
        for checkpointer in self.checkpointers:
            checkpointer.__exit__(None, None, None)
        self._threads.shutdown()


@pytest.fixture
def shards(tmp_path: Path) -> Any:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    ids = {"bos_id": 1, "eos_id": 2, "hash": "h", "boundary": "eos"}
    return SimpleNamespace(tokenizer_path=tmp_path / "tokenizer", manifest={"tokenizer": ids}, fingerprint="f" * 64)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.create(CONFIG, {})
    return run


@pytest.fixture
def pair(run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(module, "PAUSES_S", (0.001, 0.001))
    found = Pair(run, CONFIG, shards)
    yield found
    found.leave()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`full_disk(rank, times)`: that rank cannot write its part, so many times."""
    write, left = module.write_parts, {}

    def write_parts(folder: Path, rank: int, *rest: Any) -> None:
        if left.get(rank, 0) > 0:
            left[rank] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, rank, *rest)

    monkeypatch.setattr(module, "write_parts", write_parts)
    return left.__setitem__


def names(run: Run) -> list[str]:
    return sorted(p.name for p in run.checkpoints_path.iterdir())


def test_each_rank_writes_about_half_and_the_checkpoint_resumes_in_one_process(
    pair: Pair, run: Run, shards: Any, monkeypatch: pytest.MonkeyPatch
):
    written, write = {}, module.write_parts

    def write_parts(folder: Path, rank: int, snapshot: Any, *rest: Any) -> None:
        written[rank] = sum(t.nbytes for part in (snapshot.weights, snapshot.optimizer) for t in part.values())
        write(folder, rank, snapshot, *rest)

    monkeypatch.setattr(module, "write_parts", write_parts)
    assert pair.step_and_save() == [None, None]
    assert [[p.name for p in committed] for committed in pair.close()] == [["step-00000001"], []]
    assert min(written.values()) > 0.4 * sum(written.values())
    assert names(run) == ["step-00000001"]
    assert sorted(p.name for p in (run.checkpoints()[0]).iterdir() if p.suffix != ".json") == [
        "model-00001-of-00001.safetensors",
        "trainer",
    ]
    with Checkpointer(run, CONFIG, Context(device=torch.device("cpu")), shards, latest_good(run)[0]) as alone:
        resumed = alone.resume()
    state = pair.states[0]
    for ours, theirs in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in state.optimizer.state[theirs].items():
            assert torch.equal(resumed.optimizer.state[ours][key], value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_did_not_fit_is_written_again(rank: int, pair: Pair, run: Run, full_disk: Any):
    full_disk(rank, 2)
    pair.step_and_save()
    pair.close()
    assert [line["event"] for line in run.journal()] == ["save_failed", "save_failed", "committed"]
    assert f"rank {rank}: cannot write" in run.journal()[0]["reason"]
    assert names(run) == ["step-00000001"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_stays_full_stops_both_at_the_same_call(rank: int, pair: Pair, run: Run, full_disk: Any):
    pair.step_and_save()
    pair.close()
    full_disk(rank, 3)
    pair.step_and_save()
    for checkpointer in pair.checkpointers:
        checkpointer._worker.submit(lambda: None).result(DEADLINE_S)
    assert pair.both(lambda rank: pair.checkpointers[rank].poll()) == [[], []], "the loop agrees first"
    assert all(checkpointer.failed for checkpointer in pair.checkpointers)
    for error in pair.step_and_save():
        assert isinstance(error, CheckpointError)
        assert f"rank {rank}: cannot write" in str(error)
        assert "bytes needed" in str(error) and "bytes free" in str(error)
    assert names(run) == ["step-00000001"] and latest_good(run)[1] == [], "what was committed stays whole"


def test_a_run_that_goes_on_commits_the_next_checkpoint_but_needs_its_last(
    run: Run, shards: Any, full_disk: Any, monkeypatch: Any
):
    monkeypatch.setattr(module, "PAUSES_S", (0.001,))
    pair = Pair(run, replace(CONFIG, saving=replace(CONFIG.saving, on_error="continue")), shards)
    full_disk(1, 2)
    pair.step_and_save()
    assert pair.step_and_save() == [None, None]
    assert not any(checkpointer.failed for checkpointer in pair.checkpointers)
    assert [[p.name for p in committed] for committed in pair.close()] == [["step-00000002"], []]
    full_disk(1, 2)
    pair.step_and_save()
    assert all(isinstance(error, CheckpointError) for error in pair.close())
    pair.leave()
    assert names(run) == ["step-00000002"]


def test_a_rank_that_does_not_see_the_run_folder_says_where(pair: Pair, run: Run, monkeypatch: pytest.MonkeyPatch):
    tell = module.Peers.tell
    monkeypatch.setattr(module.Peers, "tell", lambda s, k, t="": tell(s, k, t and t.replace("run/", "elsewhere/")))
    pair.step_and_save()
    for error in pair.close():
        assert isinstance(error, CheckpointError) and "rank 1 on" in str(error)
        assert "must see the run folder that rank 0 writes to" in str(error)


def test_a_long_commit_is_waited_for_in_many_short_exchanges(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """One collective would meet its time limit."""
    commit, held = module.commit_checkpoint, threading.Event()
    monkeypatch.setattr(module, "commit_checkpoint", lambda *a: held.wait(DEADLINE_S) and commit(*a))
    pair.step_and_save()
    before = pair.exchange.count
    closing = ThreadPoolExecutor(1)
    ended = closing.submit(pair.close)
    while pair.exchange.count < before + 5:
        pass
    held.set()
    assert [[p.name for p in committed] for committed in ended.result(DEADLINE_S)] == [["step-00000001"], []]
    closing.shutdown()


def test_a_rank_whose_peer_is_gone_leaves_within_seconds_and_commits_nothing(pair: Pair, run: Run, monkeypatch: Any):
    monkeypatch.setattr(module.Checkpointer, "_write_own", lambda *_: None)  # rank 1 dies before it writes
    pair.step_and_save()
    pair.checkpointers[0].__exit__(None, None, None)
    failed = pair.checkpointers[0]._saving
    assert failed is not None and failed.done()
    with pytest.raises(CheckpointError, match=r"rank 0 gave up waiting for 'save 1.1 rank 1': another rank has ended"):
        failed.result()
    assert names(run) == [] and run.journal() == []
