"""The name map: which rows of a fused matrix are which, and what does not need torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.model.names import name_map, to_huggingface
from tinylab.model.transformer import Llama

CONFIG = Model(vocab_size=31, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_head=6, d_ff=48, seq_len=16)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tie_embeddings=True)], ids=["untied", "tied"])
def test_the_parts_cover_every_row_of_every_parameter_once(config: Model):
    parameters = dict(Llama(config).named_parameters())
    assert set(name_map(config)) == set(parameters)
    for name, parts in name_map(config).items():
        rows = [row for part in parts for row in range(part.rows.start, part.rows.stop)]
        assert rows == list(range(parameters[name].shape[0])), name
        assert {part.shape[1:] for part in parts} == {tuple(parameters[name].shape[1:])}, name


def test_the_fused_matrices_hold_their_parts_in_the_order_that_the_model_computes_with():
    """The order of transformer.py: query heads, key heads, value heads; gate, then up."""
    names = name_map(CONFIG)
    q, k, v = names["blocks.0.attn.qkv.weight"]
    assert [part.name.split(".")[-2] for part in (q, k, v)] == ["q_proj", "k_proj", "v_proj"]
    assert [part.rows for part in (q, k, v)] == [slice(0, 24), slice(24, 36), slice(36, 48)]
    gate, up = names["blocks.0.mlp.gate_up.weight"]
    assert [part.name.split(".")[-2] for part in (gate, up)] == ["gate_proj", "up_proj"]
    assert [part.rows for part in (gate, up)] == [slice(0, 48), slice(48, 96)]


def test_the_tensors_of_a_checkpoint_share_the_parameters_memory():
    model = Llama(CONFIG)
    named = to_huggingface(model.state_dict(), CONFIG)
    named["model.layers.1.self_attn.k_proj.weight"].fill_(7.0)
    assert torch.equal(model.get_parameter("blocks.1.attn.qkv.weight")[24:36], torch.full((12, 32), 7.0))
    assert named["model.layers.1.self_attn.k_proj.weight"].requires_grad is False


def test_the_name_map_needs_no_torch():
    code = "import sys, tinylab.model.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
