"""Batches as tensors: what the order says, by hand-read tokens; threads that end; errors that arrive."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, Parallel, RunConfig, Source, Validation
from tinylab.config.stages import Schedule, Stage
from tinylab.data.loader import Loader, validation_batches, validation_windows
from tinylab.data.order import DataOrder, data_hash, format_hash
from tinylab.data.shards import integrity
from tinylab.data.shards.reader import open_shards
from tinylab.errors import ConfigError, DataError
from tinylab.model.loss import IGNORED

SEQ = 4
PROSE = [[*range(10 + i, 12 + i + i % 3), 2] for i in range(20)]
CODE = [[50, 51, 52, 53, 54, 55, 2], [60, 2], [61, 62, 63, 64, 2]]


def toy_run(batch: int = 8, samples: int = 40, *, mask: bool = False, micro_batch: int = 3) -> RunConfig:
    """A run of sequences of 4 tokens over two sources."""
    sources = (Source(name="prose", corpus="local:prose"), Source(name="code", corpus="local:code"))
    return RunConfig(
        model=Model(vocab_size=100, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=8, seq_len=SEQ),
        data=Data(sources=sources, vocab_size=100, document_mask=mask),
        stages=(Stage(tokens=samples * SEQ, batch_tokens=batch * SEQ, mixture={"prose": 0.7, "code": 0.3}),),
        schedule=Schedule(kind="constant", warmup_tokens=0),
        parallel=Parallel(micro_batch=micro_batch),
        validation=Validation(sequences=6),
    )


@pytest.fixture
def shards(make_data):
    return make_data({"prose": PROSE, "code": CODE}, {"prose": PROSE[:9], "code": CODE}, shard_tokens=20)


def test_batches_hold_the_tokens_at_the_addresses_of_the_order(shards):
    config = toy_run()
    flat = {name: [i for d in docs for i in d] for name, docs in (("prose", PROSE), ("code", CODE))}
    order = DataOrder.of(config, shards)
    with Loader(config, shards) as loader:
        batches = list(loader)
    assert [b.step for b in batches] == [1, 2, 3, 4, 5]
    for batch in batches:
        samples = order.samples(batch.step)
        assert [len(m.inputs) for m in batch.micro_batches] == [3, 3, 2]
        inputs = torch.cat([m.inputs for m in batch.micro_batches])
        targets = torch.cat([m.targets for m in batch.micro_batches])
        assert inputs.dtype == targets.dtype == torch.int64
        for row in range(8):
            stream, at = flat[order.names[samples.source[row]]], int(samples.window[row]) * SEQ
            assert inputs[row].tolist() == stream[at : at + SEQ]
            assert targets[row].tolist() == stream[at + 1 : at + SEQ + 1]
        assert batch.data_hash == data_hash(samples)
        assert all(m.document_ids is None for m in batch.micro_batches)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_ranks_together_read_what_one_rank_reads(shards, world, micro_batch):
    config = toy_run()
    with Loader(config, shards) as loader:
        whole = list(loader)
    parts = []
    for rank in range(world):
        with Loader(config, shards, rank=rank, world=world, micro_batch=micro_batch) as loader:
            parts.append(list(loader))
    for i, batch in enumerate(whole):
        expected = torch.cat([m.targets for m in batch.micro_batches])
        assert torch.equal(torch.cat([m.targets for p in parts for m in p[i].micro_batches]), expected)
        assert format_hash(sum(p[i].data_hash for p in parts)) == format_hash(batch.data_hash)


def test_a_loader_started_at_any_step_continues_exactly(shards):
    config = toy_run()
    with Loader(config, shards) as loader:
        whole = {b.step: b for b in loader}
    for start in (2, 5):
        with Loader(config, shards, start_step=start) as loader:
            batch = next(loader)
        assert (batch.step, batch.data_hash) == (start, whole[start].data_hash)
        assert torch.equal(batch.micro_batches[0].inputs, whole[start].micro_batches[0].inputs)
    with Loader(config, shards, start_step=6) as loader:
        assert list(loader) == []


def test_document_mask_numbers_documents_and_leaves_out_targets_of_another_document(shards):
    masked, plain = toy_run(mask=True), toy_run()
    with Loader(masked, shards) as one, Loader(plain, shards) as two:
        for a, b in zip(one, two, strict=True):
            for left, right in zip(a.micro_batches, b.micro_batches, strict=True):
                assert torch.equal(left.inputs, right.inputs)
                # in these documents the id 2 is the end, and nothing else: behind it another document begins
                ends = left.inputs == 2
                assert torch.equal(left.targets, right.targets.masked_fill(ends, IGNORED))
                assert left.document_ids is not None and left.document_ids.dtype == torch.int32
                expected = torch.cumsum(torch.nn.functional.pad(ends[:, :-1], (1, 0)).int(), dim=1)
                assert torch.equal(left.document_ids, expected.int())


def test_ranks_that_do_not_divide_the_batch_are_refused_before_a_thread_starts(shards):
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"ranks \(3\) must divide the sequences of a step \(8\).*24 or 36"):
        Loader(toy_run(), shards, world=3)
    assert threading.active_count() == before


def test_shards_of_another_vocabulary_are_refused(shards):
    config = toy_run()
    config = replace(config, model=replace(config.model, vocab_size=90), data=replace(config.data, vocab_size=90))
    with pytest.raises(DataError, match=r"vocabulary, 90 entries \(model.vocab_size\); found a tokenizer of 100"):
        Loader(config, shards)


def test_an_id_that_turns_up_after_the_check_is_named_with_file_and_token(shards):
    shards.stream("train", "code").read(0, 1)
    data = np.memmap(shards.path / "train/code/00000.bin", dtype="<u2", mode="r+")
    data[5] = 65535
    data.flush()
    with (
        Loader(toy_run(), shards) as loader,
        pytest.raises(DataError, match=r"train/code/00000\.bin, token 5: ids must be below 100; found 65535"),
    ):
        list(loader)


def test_no_thread_is_left_after_close_error_or_end(shards, monkeypatch):
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == "tinylab-loader" or "hashing" in t.name]

    config = toy_run(batch=1, samples=40)
    loader = Loader(config, shards)
    next(loader)
    assert threads()[0] == "tinylab-loader" and len(threads()) > 1
    loader.close()
    loader.close()
    assert threads() == []
    with pytest.raises(StopIteration):
        next(loader)
    with Loader(config, shards) as loader:
        assert len(list(loader)) == 40
    assert threads() == []

    def fail(self, step):
        raise OSError(f"disk gone at step {step}")

    monkeypatch.setattr(DataOrder, "samples", fail)
    with pytest.raises(OSError, match="disk gone at step 1"):
        next(Loader(config, shards))
    assert threads() == []


def test_reading_ahead_is_bounded(shards, monkeypatch):
    read: list[int] = []
    read_step = Loader._read_step
    monkeypatch.setattr(Loader, "_read_step", lambda self, step, s: read.append(step) or read_step(self, step, s))
    with Loader(toy_run(batch=1), shards, prefetch=2) as loader:
        next(loader)
        threading.Event().wait(0.3)
        assert read == [1, 2, 3, 4]  # one taken, two waiting, one read and held until there is room


# ---- validation ---------------------------------------------------------------------------------------------------


def test_validation_windows_are_spread_over_sources_and_split(make_data):
    long = [[5] * 401]
    shards = make_data({"prose": PROSE, "code": CODE}, {"prose": long, "code": long}, shard_tokens=1000)
    expected = [(name, window) for name in ("prose", "code") for window in (0, 33, 66)]
    assert validation_windows(toy_run(), shards) == expected


def test_a_short_source_leaves_its_part_of_the_validation_to_the_others(make_data):
    shards = make_data({"prose": PROSE, "code": CODE}, {"prose": [[5] * 41], "code": [[6] * 5]})
    assert validation_windows(toy_run(), shards) == [("prose", w) for w in (0, 2, 4, 6, 8)] + [("code", 0)]
    shards = make_data({"prose": PROSE, "code": CODE}, {"prose": [[5] * 9], "code": []}, name="less")
    assert validation_windows(toy_run(), shards) == [("prose", 0), ("prose", 1)]


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_validation_over_ranks_is_the_same_set_even_when_some_have_none(shards, world):
    config = toy_run()
    expected = torch.cat([m.inputs for m in validation_batches(config, shards, 4)])
    assert len(expected) == 6
    parts = [m.inputs for rank in range(world) for m in validation_batches(config, shards, 4, rank, world)]
    assert torch.equal(torch.cat(parts), expected)


def test_a_validation_split_without_a_window_is_refused_with_what_it_holds(make_data):
    shards = make_data({"prose": PROSE, "code": CODE}, {"prose": [[5, 6]], "code": []})
    with pytest.raises(
        DataError, match=r"seq_len \+ 1 = 5 tokens of one source; found prose: 2, code: 0.*raise data\.val"
    ):
        next(validation_batches(toy_run(), shards, 4))


def test_one_short_document_feeds_four_ranks(make_data):
    shards = make_data({"prose": [[5, 6, 7, 8, 2]], "code": []})
    config = toy_run(batch=4, samples=8)
    config = replace(config, stages=(replace(config.stages[0], mixture={"prose": 1.0}),))
    for rank in range(4):
        with Loader(config, open_shards(shards.path), rank=rank, world=4) as loader:
            assert [m.inputs.tolist() for b in loader for m in b.micro_batches] == [[[5, 6, 7, 8]]] * 2


# ---- shards are compared with their digests ahead of their use -------------------------------------------------------


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def test_a_damaged_shard_is_named_before_the_batch_that_needs_it_and_the_batches_before_it_are_given(shards):
    config = toy_run(batch=1)
    order = DataOrder.of(config, shards)
    numbers = [(int(s.source[0]), int(s.window[0]) * SEQ // 20) for s in map(order.samples, range(1, 41))]
    last = max(range(40), key=lambda i: numbers.index(numbers[i]))  # the shard that is needed latest
    source, number = numbers[last]
    damage(shards.path / "train" / order.names[source] / f"{number:05d}.bin")
    given = []
    with (
        Loader(config, open_shards(shards.path)) as loader,
        pytest.raises(DataError, match=rf"train/{order.names[source]}/{number:05d}\.bin: SHA-256 differs"),
    ):
        given.extend(batch.step for batch in loader)
    assert 0 < len(given) <= numbers.index(numbers[last])


def test_a_batch_waits_for_the_shards_that_it_reads_and_for_no_other(make_data, monkeypatch):
    """Shards of one window each; those of later steps never come."""
    shards = make_data({"prose": [[5] * 5] * 40, "code": [[6] * 5] * 40}, shard_tokens=5)
    config = toy_run(batch=1)
    order, needed = DataOrder.of(config, shards), set()
    for step in (1, 2):
        samples = order.samples(step)
        starts = samples.window * SEQ
        needed |= {s.path for s in shards.stream("train", order.names[samples.source[0]]).shards_of(starts, SEQ + 1)}
    released, compare = threading.Event(), integrity.compare_file

    def slow(path, entry):
        if path.suffix == ".bin" and path not in needed:
            released.wait(30)
        return compare(path, entry)

    monkeypatch.setattr(integrity, "compare_file", slow)
    with Loader(config, open_shards(shards.path)) as loader:
        assert [next(loader).step for _ in (1, 2)] == [1, 2]
        released.set()


def test_shards_of_coming_steps_are_compared_before_they_are_read(shards, monkeypatch):
    by_thread: dict[str, str] = {}
    compare = integrity.compare_file

    def noted(path, entry):
        by_thread[path.name] = threading.current_thread().name
        return compare(path, entry)

    monkeypatch.setattr(integrity, "compare_file", noted)
    config = toy_run(batch=1, mask=True)
    with Loader(config, open_shards(shards.path), prefetch=1) as loader:
        next(loader)
        loader._hashing.shutdown(wait=True)
        assert len(by_thread) > 2 and {Path(name).suffix for name in by_thread} == {".bin", ".idx", ".json"}
    assert any(thread.startswith("tinylab-hashing") for thread in by_thread.values())
