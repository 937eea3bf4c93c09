"""Counts from the configuration against a meta model, torch's FLOP counter, tensors really kept, and TinyLlama's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinylab.config.architecture import Model
from tinylab.config.presets import tiny, tinyllama_1b, tinyllama_120m
from tinylab.errors import ConfigError
from tinylab.model.accounting import (
    activation_bytes_per_token,
    flops_per_token,
    inference_memory_bytes,
    kv_cache_bytes_per_token,
    memory_bytes,
    parameter_counts,
    training_memory_bytes,
)
from tinylab.model.cache import KVCache
from tinylab.model.transformer import Llama

SMALL = Model(vocab_size=64, n_layer=3, d_model=48, n_head=4, n_kv_head=2, d_ff=80, seq_len=32)
SHAPES = {
    "small": SMALL,
    "tied": replace(SMALL, tie_embeddings=True),
    "wide heads": replace(SMALL, d_head=32),
    "tiny": tiny().model,
    "120m": tinyllama_120m().model,
    "1b": tinyllama_1b().model,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_equal_those_of_a_meta_model(shape: str):
    with torch.device("meta"):
        model = Llama(SHAPES[shape])
    assert parameter_counts(SHAPES[shape])["total"] == sum(p.numel() for p in model.parameters())


def test_tinyllamas_published_counts():
    counts = parameter_counts(tinyllama_1b().model)
    assert counts["total"] == 1_100_048_384
    assert counts["matmul"] == 1_034_420_224
    assert counts["attention"] == 22 * 9_437_184
    assert counts["mlp"] == 22 * 34_603_008
    assert parameter_counts(tinyllama_120m().model)["total"] == 121_129_728


def test_tinyllamas_flops_by_every_formula():
    model = tinyllama_1b().model
    assert flops_per_token(model) == 7_313_817_600
    found = {f: round(flops_per_token(model, formula=f) / 1e9, 3) for f in ("F", "P", "C", "6N", "6N+C")}
    assert found == {"F": 7.314, "P": 7.708, "C": 6.760, "6N": 6.600, "6N+C": 7.154}


@pytest.mark.parametrize("shape", ["small", "tied", "wide heads", "tiny"])
def test_formula_f_is_what_torch_counts(shape: str):
    """On the math backend, where attention's products are ordinary ones, of logits made whole."""
    config = SHAPES[shape]
    model = Llama(config)
    ids = torch.zeros(2, config.seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config) * ids.numel()


def test_the_kv_cache_is_as_large_as_counted():
    assert kv_cache_bytes_per_token(tinyllama_1b().model) == 22_528
    cache = KVCache(SMALL, 3, 7, dtype=torch.bfloat16)
    real = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    assert real == 3 * 7 * kv_cache_bytes_per_token(SMALL)


def test_activations_are_as_large_as_what_autograd_keeps():
    """fp32, eager, SDPA on the CPU: within a tenth, for masks, statistics and tables are left out."""
    config = replace(tiny().model, vocab_size=64)
    model = Llama(config)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.zeros(4, config.seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.hidden(ids)
    real = sum(size for address, size in kept.items() if address not in parameters)
    assert out.grad_fn is not None
    assert activation_bytes_per_token(config, "fp32") * ids.numel() == pytest.approx(real, rel=0.1)


def test_recomputing_leaves_the_inputs_of_the_layers_and_one_layer_that_has_everything():
    none, selective, full = (activation_bytes_per_token(SMALL, "fp32", r) for r in ("none", "selective", "full"))
    outside = 3 * 4 * 48
    layer = (none - outside) // 3
    assert full == 3 * 4 * 48 + layer + outside
    # attention: 4 + 2 · 2 heads of 12 values, its result and the last product; gate, up; down
    assert selective == full + 3 * 4 * ((4 + 2 * 2) * 12 + 4 * 12 + 48 + 2 * 80 + 48)
    assert full < selective < none
    run = tinyllama_1b()
    less = replace(run, parallel=replace(run.parallel, recompute="full"))
    assert memory_bytes(less)["activations"] < memory_bytes(run)["activations"] / 5


def test_training_state_is_16_bytes_a_parameter_and_shards():
    one, sixteen = (training_memory_bytes(tinyllama_1b().model, 8, gpus=n) for n in (1, 16))
    assert one["weights"] + one["gradients"] + one["moments"] == 16 * 1_100_048_384
    assert sixteen["moments"] == 8 * 1_100_048_384 // 16
    assert sixteen["activations"] == one["activations"]
    assert training_memory_bytes(tinyllama_1b().model, 8, gpus=16, shard=False) == one
    for parts in (one, sixteen):
        assert parts["total"] == sum(v for k, v in parts.items() if k != "total")


def test_a_rank_never_holds_more_sequences_than_its_share():
    run = tinyllama_1b()
    assert memory_bytes(run, gpus=1024)["activations"] * 8 == memory_bytes(run, gpus=16)["activations"]


def test_inference_counts_weights_once_and_the_cache_per_row():
    parts = inference_memory_bytes(tinyllama_1b().model, batch=2)
    assert parts == {"weights": 2_200_096_768, "kv_cache": 92_274_688, "total": 2_292_371_456}


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"formula must be one of F, P, C, 6N, 6N\+C; found 'G'"):
        flops_per_token(SMALL, formula="G")
    with pytest.raises(ConfigError, match="seq_len must be at least 1"):
        flops_per_token(SMALL, 0)
    with pytest.raises(ConfigError, match="dtype must be one of fp32, bf16, fp16; found 'int8'"):
        kv_cache_bytes_per_token(SMALL, "int8")
