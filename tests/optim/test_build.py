"""Which parameters decay, AdamW against the published formula, and another kind of optimizer against a loop by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tinylab.checkpoint.state import TrainState
from tinylab.config.architecture import Model
from tinylab.config.schema import Optimizer, Parallel
from tinylab.dist.context import Context
from tinylab.model.loss import MicroBatch
from tinylab.model.precision import resolve_precision
from tinylab.model.transformer import Llama
from tinylab.optim.build import KINDS, build_optimizer, logical_matrices, parameter_groups
from tinylab.training.step import train_step

SMALL = Model(vocab_size=16, n_layer=1, d_model=8, n_head=2, n_kv_head=1, d_ff=12, seq_len=8)


def model(config: Model = SMALL) -> Llama:
    result = Llama(config)
    result.init_weights(0)
    return result


def test_matrices_decay_and_norms_and_embedding_do_not():
    decayed, spared = parameter_groups(model(), Optimizer(weight_decay=0.1))
    assert decayed["weight_decay"] == 0.1
    assert decayed["names"] == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.out.weight",
        "blocks.0.mlp.gate_up.weight",
        "blocks.0.mlp.down.weight",
        "head.weight",
    ]
    assert spared["weight_decay"] == 0.0
    assert spared["names"] == [
        "embed.weight",
        "blocks.0.attn_norm.weight",
        "blocks.0.mlp_norm.weight",
        "norm.weight",
    ]


def test_a_tied_head_is_spared_with_its_embedding():
    decayed, spared = parameter_groups(model(replace(SMALL, tie_embeddings=True)), Optimizer())
    assert "embed.weight" in spared["names"]
    assert "head.weight" not in decayed["names"] + spared["names"]


def test_tinyllamas_original_decays_every_parameter():
    tiny = model()
    (group,) = parameter_groups(tiny, Optimizer(decay="all"))
    assert group["names"] == [name for name, _ in tiny.named_parameters()]
    assert group["weight_decay"] == 0.1


def test_two_steps_equal_the_published_formula():
    """Decoupled decay, then the bias-corrected moments (Loshchilov and Hutter 2019, algorithm 2), in fp64."""
    settings = Optimizer(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tiny = model()
    optimizer = build_optimizer(tiny, settings)
    weight = tiny.head.weight
    wanted, m, v = weight.detach().double().clone(), 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    for step in (1, 2):
        for parameter in tiny.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        assert weight.grad is not None
        g = weight.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    # fp32 weights of order 0.2: their last bit is 1.5e-8.
    assert (weight.double() - wanted).abs().max() < 1e-7


def test_the_fused_form_is_used_on_the_cpu():
    assert build_optimizer(model(), Optimizer()).defaults["fused"] is True


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_every_parameter_is_in_exactly_one_group(decay):
    tiny = model()
    ids = [id(p) for g in parameter_groups(tiny, Optimizer(decay=decay)) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in tiny.parameters())


class Normalized(torch.optim.Optimizer):
    """Each logical matrix moves by its learning rate along its own gradient, scaled to norm 1."""

    def __init__(self, model: Llama, optimizer: Optimizer) -> None:
        matrices, others = parameter_groups(model, optimizer)
        super().__init__([matrices, others | {"rate_scale": 0.25}], {"lr": optimizer.lr})
        self.config = model.config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                for rows in logical_matrices(self.config, name):
                    gradient = weight.grad[rows]
                    weight[rows] -= group["lr"] * gradient / gradient.norm()


def test_another_kind_of_optimizer_trains_with_its_rate_scale_on_each_logical_matrix(monkeypatch):
    monkeypatch.setitem(KINDS, "normalized", Normalized)
    settings = Optimizer(kind="normalized")  # pyright: ignore[reportArgumentType]
    trained, by_hand = model(), model()
    state = TrainState(model=trained, parallel=Parallel(), optimizer=build_optimizer(trained, settings))
    # Two query heads, one key head and one value head of 4 rows each; gate and up of 12 rows each.
    parts = {"blocks.0.attn.qkv.weight": (8, 4, 4), "blocks.0.mlp.gate_up.weight": (12, 12)}
    context, fp32 = Context(device=torch.device("cpu")), resolve_precision("cpu", "fp32")
    for step, lr in enumerate((0.1, 0.2, 0.05)):
        ids = torch.randint(0, 16, (3, 9), generator=torch.Generator().manual_seed(step))
        batch = MicroBatch(inputs=ids[:, :-1], targets=ids[:, 1:], document_ids=None)
        train_step(state, [batch], 24, lr=lr, clip_norm=None, precision=fp32, context=context)

        by_hand.zero_grad()
        F.cross_entropy(by_hand(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        with torch.no_grad():
            for name, weight in by_hand.named_parameters():
                rate = 0.25 * lr if "norm" in name or name == "embed.weight" else lr
                assert weight.grad is not None
                moves = [rate * g / g.norm() for g in weight.grad.split(parts.get(name, weight.shape[0]))]
                weight -= torch.cat(moves)
    for name, weight in trained.named_parameters():
        torch.testing.assert_close(weight, by_hand.get_parameter(name), rtol=0, atol=2e-6, msg=name)
