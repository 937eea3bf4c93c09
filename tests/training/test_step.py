"""One optimizer step, against the plain formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tinylab.checkpoint.state import TrainState
from tinylab.config.architecture import Model
from tinylab.config.schema import Optimizer, Parallel
from tinylab.data.loader import StepBatch
from tinylab.dist.context import Context
from tinylab.errors import TinylabError
from tinylab.model.loss import MicroBatch
from tinylab.model.precision import resolve_precision
from tinylab.model.transformer import Llama
from tinylab.optim.build import build_optimizer
from tinylab.training.step import agree, train_step

MODEL = Model(vocab_size=50, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=32, seq_len=8)
CONTEXT = Context(device=torch.device("cpu"))
FP32 = resolve_precision("cpu", "fp32")


def new_state(lr: float = 1e-2) -> TrainState:
    model = Llama(MODEL)
    model.init_weights(3)
    return TrainState(model=model, parallel=Parallel(), optimizer=build_optimizer(model, Optimizer(lr=lr)))


def some_batch(masked: bool) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (6, 9), generator=generator)
    targets = ids[:, 1:].clone()
    if masked:
        targets[0, 2:] = -100  # the first micro-batch loses far more targets than the others
        targets[1, 5] = -100
    return MicroBatch(inputs=ids[:, :-1].contiguous(), targets=targets, document_ids=None)


def split(batch: MicroBatch, size: int) -> list[MicroBatch]:
    pairs = zip(batch.inputs.split(size), batch.targets.split(size), strict=True)
    return [replace(batch, inputs=i, targets=t) for i, t in pairs]


def reference_step(batch: MicroBatch, clip_norm: float | None) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Mean of the cross-entropy over every counted target, torch's own clipping and AdamW."""
    state = new_state()
    logits = state.model(batch.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip_norm or math.inf)
    state.optimizer.step()
    return loss.item(), norm.item(), dict(state.model.state_dict())


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_step_is_that_of_the_mean_over_the_whole_batch(size: int, masked: bool, clip_norm: float | None):
    batch = some_batch(masked)
    state = new_state()
    micro_batches = split(batch, size)
    _, targets, _ = agree(CONTEXT, StepBatch(1, micro_batches, 0), False)
    result = train_step(state, micro_batches, targets, lr=1e-2, clip_norm=clip_norm, precision=FP32, context=CONTEXT)
    loss, norm, weights = reference_step(batch, clip_norm)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.5, "the clipping must bite"
    for name, weight in state.model.state_dict().items():
        # Adam's first step is nearly lr * sign(gradient): fp32 noise in tiny gradients shows at once.
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-4, msg=name)
    assert state.step == 1


def test_the_scheduled_rate_is_the_one_applied():
    state = new_state(lr=1.0)
    before = state.model.norm.weight.detach().clone()
    batch = some_batch(False)
    train_step(state, [batch], 48, lr=1e-3, clip_norm=None, precision=FP32, context=CONTEXT)
    moved = (state.model.norm.weight - before).abs().max().item()
    assert 0.9e-3 < moved < 1.1e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stops_before_the_update_and_names_the_step(poison: float):
    state = new_state()
    state.step = 16
    with torch.no_grad():
        state.model.head.weight[0, 0] = poison
    before = {n: w.clone() for n, w in state.model.state_dict().items()}
    with pytest.raises(TinylabError, match=r"must be finite; found .* in step 17.*weights are those of step 16"):
        train_step(state, [some_batch(False)], 48, lr=1e-2, clip_norm=1.0, precision=FP32, context=CONTEXT)
    for name, weight in state.model.state_dict().items():
        assert torch.equal(weight.nan_to_num(7), before[name].nan_to_num(7)), name
    assert not state.optimizer.state and state.step == 16


def test_ranks_agree_on_the_sum_of_hashes_modulo_two_to_the_64():
    batch = StepBatch(1, [some_batch(True)], 2**64 - 1)
    assert agree(CONTEXT, batch, False) == (2**64 - 1, 48 - 6 - 1, False)
    assert agree(CONTEXT, batch, True)[2]
