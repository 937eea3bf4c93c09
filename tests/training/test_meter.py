"""What a line of metrics says is what its step did: computed again from configuration, data and checkpoints."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tinylab.config.schema import RunConfig
from tinylab.data.loader import Loader, validation_batches
from tinylab.data.order import data_hash, format_hash
from tinylab.data.prepare import prepare
from tinylab.data.shards.reader import ShardSet
from tinylab.dist.context import Context
from tinylab.formats.load import load_folder
from tinylab.model.accounting import flops_per_token
from tinylab.model.transformer import Llama
from tinylab.optim.schedule import lr_at
from tinylab.runs.folder import Run
from tinylab.training import meter
from tinylab.training.step import StepResult

CONTEXT = Context(device=torch.device("cpu"))


@pytest.fixture
def shards(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    monkeypatch.setenv("TINYLAB_HOME", str(trainer.home))
    return prepare(trainer.config.data)


def test_each_step_had_its_own_rate_and_samples(reference: Run, tiny_config: RunConfig, shards: ShardSet):
    with Loader(tiny_config, shards) as loader:
        for r in reference.metric_records():
            assert r["lr"] == lr_at(tiny_config, r["step"])
            assert r["data_hash"] == format_hash(data_hash(loader.order.samples(r["step"])))


def test_the_first_loss_is_that_of_the_fresh_weights_on_the_first_batch(
    reference: Run, tiny_config: RunConfig, shards: ShardSet
):
    model = Llama(tiny_config.model)
    model.init_weights(tiny_config.seed)
    with Loader(tiny_config, shards) as loader, torch.no_grad():
        parts = next(loader).micro_batches
        losses = [F.cross_entropy(model(p.inputs).flatten(0, 1), p.targets.flatten()).item() for p in parts]
    assert reference.metric_records()[0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("step", [1, 4, 12, 24])
def test_a_checkpoint_holds_the_weights_whose_validation_loss_is_on_its_line(
    step: int, reference: Run, tiny_config: RunConfig, shards: ShardSet
):
    model = load_folder(reference.checkpoints_path / f"step-{step:08d}")
    sizes = piece_bytes(shards.tokenizer_path / "tokenizer.json")
    nats = targets = text_nats = text_bytes = 0.0
    for batch in validation_batches(tiny_config, shards, micro_batch=3):
        with torch.no_grad():
            losses = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none")
        for loss, target in zip(losses.tolist(), batch.targets.flatten().tolist(), strict=True):
            nats, targets = nats + loss, targets + 1
            text_nats, text_bytes = text_nats + loss * (sizes[target] > 0), text_bytes + sizes[target]
    record = reference.metric_records()[step - 1]
    assert targets == 8 * 32 and text_nats < nats, "the end of a document is no text"
    assert record["validation_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert record["bits_per_byte"] == pytest.approx(text_nats / math.log(2) / text_bytes, rel=1e-6)


def piece_bytes(tokenizer: Path) -> dict[int, int]:
    """Bytes of text behind each id, read from the tokenizer's own file."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    result = {}
    for piece, number in vocabulary.items():
        is_special, is_byte = piece in ("<unk>", "<s>", "</s>"), re.fullmatch("<0x[0-9A-F]{2}>", piece)
        result[number] = 0 if is_special else 1 if is_byte else len(piece.replace("\u2581", " ").encode())
    return result


def test_rates_are_those_of_all_ranks(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meter, "device_peak", lambda device: 1e12)
    watch = meter.Meter(tiny_config, replace(CONTEXT, world=2))
    state: Any = SimpleNamespace(step=7, hours=0.5)

    def slow() -> Any:
        time.sleep(0.02)
        yield "a batch"

    for _ in watch.timed(slow()):
        time.sleep(0.03)
        found = watch.record(state, StepResult(loss=2.0, grad_norm=1.0), 1e-3, 255)
    assert found["data_wait_s"] >= 0.02 and found["step_time_s"] >= found["data_wait_s"] + 0.03
    assert found["tokens_per_s"] == pytest.approx(256 / found["step_time_s"], rel=1e-3)
    assert found["mfu"] == pytest.approx(flops_per_token(tiny_config.model) * found["tokens_per_s"] / 2e12, rel=1e-3)
    assert state.hours == pytest.approx(0.5 + 2 * found["step_time_s"] / 3600, rel=1e-6)
    assert 0.01 < found["peak_memory_gib"] < 100
