"""How far our logits lie from transformers' LlamaForCausalLM, over architectures and number formats."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tinylab.checkpoint.formats import load_folder
from tinylab.checkpoint.huggingface import save_weights, write_config
from tinylab.config.schema import Model, RopeScaling
from tinylab.model.generate import generate_ids
from tinylab.model.transformer import Llama

BASE = Model(vocab_size=512, n_layer=3, d_model=256, n_head=8, n_kv_head=2, d_ff=704, seq_len=128)
FP32_LIMIT = 1e-5
"""Largest absolute difference accepted in fp32, on logits of order 1."""


def architectures() -> dict[str, Model]:
    """Every shape in the table: query heads per key head, head sizes, tying, rotary bases and scalings."""
    groups = {f"GQA {8 // k}:1": replace(BASE, n_kv_head=k) for k in (8, 4, 2, 1)}
    heads = {f"head size {d}": replace(BASE, n_head=8, d_head=d) for d in (32, 64, 80, 128)}
    llama3 = RopeScaling(rope_type="llama3", factor=8.0, original_seq_len=64)
    others = {
        "tied embeddings": replace(BASE, tie_embeddings=True),
        "rope_theta 500,000": replace(BASE, rope_theta=500_000.0),
        "rope scaling linear": replace(BASE, rope_scaling=RopeScaling(rope_type="linear", factor=4.0)),
        "rope scaling llama3": replace(BASE, rope_theta=500_000.0, rope_scaling=llama3),
        "norm_eps 1e-6": replace(BASE, norm_eps=1e-6),
    }
    return groups | heads | others


@torch.no_grad()
def bench_parity(seed: int = 0, length: int = 101) -> dict[str, Any]:
    """The parity table: one row per architecture, on random weights, `length` (odd) tokens, two sequences.

    Columns: largest absolute difference of logits in fp32; the largest error of transformers' own bf16 against its
    fp32, and of ours; whether 16 greedy tokens are equal with our cache, without it, and to transformers'.
    `holds` is true when every row stays within `FP32_LIMIT`, bf16 is no worse than transformers' by more than half,
    and the tokens are equal.
    """
    rows = [_row(name, model, seed, length) for name, model in architectures().items()]
    return {
        "bench": "parity",
        "peer": f"transformers {metadata.version('transformers')} LlamaForCausalLM, eager attention",
        "rows": rows,
        "holds": all(r["holds"] for r in rows),
        "fp32_limit": FP32_LIMIT,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _row(name: str, config: Model, seed: int, length: int) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (2, length), generator=generator)
    ours = Llama(config)
    ours.init_weights(seed)
    for weight in ours.parameters():  # logits of order 1, and norms that matter
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        else:
            weight.mul_(2.0)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(ours.state_dict(), config, folder)
        write_config(config, folder, bos_id=1, eos_id=2)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs: Any = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        ours, ours_bf16 = load_folder(folder), load_folder(folder, dtype=torch.bfloat16)
    wanted: Tensor = theirs(ids).logits
    fp32 = _largest(ours(ids), wanted)
    bf16 = _largest(ours_bf16(ids), wanted)
    greedy = ids[:1, :17]
    tokens = [generate_ids(ours, greedy, 16, use_cache=cached).tolist() for cached in (True, False)]
    theirs.generation_config.eos_token_id = None
    tokens.append(theirs.generate(greedy, max_new_tokens=16, do_sample=False, pad_token_id=0).tolist())
    theirs_bf16 = _largest(theirs.to(torch.bfloat16)(ids).logits, wanted)
    same = tokens[0] == tokens[1] == tokens[2]
    return {
        "architecture": name,
        "largest_logit": wanted.abs().max().item(),
        "fp32": fp32,
        "bf16": bf16,
        "bf16_transformers": theirs_bf16,
        "greedy_equal": same,
        "holds": fp32 <= FP32_LIMIT and bf16 <= 1.5 * theirs_bf16 and same,
    }


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()
