"""Which parameters decay, and that one step of ours is one step of the published formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.config.schema import Optimizer
from tinylab.model.transformer import Llama
from tinylab.optim.build import build_adamw, parameter_groups

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
    optimizer = build_adamw(tiny, settings)
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
    assert build_adamw(model(), Optimizer()).defaults["fused"] is True


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_every_parameter_is_in_exactly_one_group(decay):
    tiny = model()
    ids = [id(p) for g in parameter_groups(tiny, Optimizer(decay=decay)) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in tiny.parameters())
