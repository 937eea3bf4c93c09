"""How far our logits are from those of transformers' LlamaForCausalLM, by architecture and number format."""

import math
import platform
from copy import deepcopy
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tinylab.bench.sides import open_in_both
from tinylab.config.architecture import Model, RopeScaling
from tinylab.model.generate import generate_ids
from tinylab.model.transformer import Llama

BASE = Model(vocab_size=512, n_layer=3, d_model=256, n_head=8, n_kv_head=2, d_ff=704, seq_len=128)


def rounding_bound(config: Model, length: int, largest_logit: float) -> float:
    """Largest difference of a logit that the rounding of two fp32 evaluations of the same weights explains.

    A sum of K products in fp32 has a relative error of about u·sqrt(K), u = 2^-24: its roundings are independent and
    add as a random walk (Higham and Mary 2019, a new approach to probabilistic rounding error analysis). The
    products of a layer sum over C (norm; q, k, v), D (scores), `length` (values), H·D (output), C (norm; gate, up)
    and F (down), those of the head over C; their errors are independent too, so that squares add: all in all
    u·sqrt(sum of K) of a logit. Two evaluations differ by sqrt(2) times that in the root mean square. The largest of
    some 100,000 logits is 4 to 5 times their root mean square, and so is the largest of as many differences, hence the
    bound is relative to the largest logit. No constant is fitted. Processors and libraries choose the order of sums; a
    blocked or fused order only makes errors smaller, so the bound holds for any of them.
    """
    C, D = config.d_model, config.head_size
    layer = 4 * C + D + length + config.n_head * D + config.d_ff
    return 2**-24 * math.sqrt(2 * (config.n_layer * layer + 2 * C)) * largest_logit


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
def bench_parity(seed: int = 0, length: int = 101, models: int = 4) -> dict[str, Any]:
    """The parity table: a row per architecture, each over `models` random models and two sequences of `length` tokens.

    Columns: largest absolute difference of logits in fp32, and what rounding explains of it (`rounding_bound`); the
    error in bf16, ours and transformers' own, both against transformers in fp32, as root mean square and as the
    largest; whether 16 greedy tokens are equal with our cache, without it, and to transformers'. A row `holds` when
    every fp32 difference stays within its bound, our bf16 error is within transformers' in the root mean square of
    every model, and the tokens are equal; `why` says which of these fails. The largest of some 100,000 roundings in
    bf16 is a matter of chance and decides nothing.
    """
    rows = [
        _row(name, [_compare(model, seed + n, length) for n in range(models)])
        for name, model in architectures().items()
    ]
    return {
        "bench": "parity",
        "peer": f"transformers {metadata.version('transformers')}, eager attention in fp32, sdpa in bf16",
        "models": models,
        "rows": rows,
        "holds": all(r["holds"] for r in rows),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _row(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One architecture: the worst of its models in every column."""
    columns = ("largest_logit", "fp32", "fp32_bound", "bf16_rms", "bf16_rms_transformers", "bf16", "bf16_transformers")
    row: dict[str, Any] = {column: max(f[column] for f in found) for column in columns}
    same = all(f["greedy_equal"] for f in found)
    excess = max(f["fp32"] / f["fp32_bound"] for f in found)
    reasons = [f"fp32 differs by {excess:.3g} times what rounding explains"] if not excess <= 1 else []
    if not all(f["bf16_rms"] <= f["bf16_rms_transformers"] for f in found):
        reasons.append("the error in bf16 exceeds transformers'")
    reasons += [] if same else ["greedy tokens differ"]
    return {"architecture": name, **row, "greedy_equal": same, "holds": not reasons, "why": "; ".join(reasons)}


def _compare(config: Model, seed: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (2, length), generator=generator)
    ours = Llama(config)
    ours.init_weights(seed)
    for weight in ours.parameters():  # logits of order 1, and norms that matter
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        else:
            weight.mul_(2.0)
    ours, theirs = open_in_both(ours, attn_implementation="eager")
    ours_bf16 = deepcopy(ours).to(torch.bfloat16)
    wanted: Tensor = theirs(ids).logits
    fp32 = ours(ids) - wanted
    greedy = ids[:1, :17]
    tokens = [generate_ids(ours, greedy, 16, use_cache=cached).tolist() for cached in (True, False)]
    tokens.append(theirs.generate(greedy, max_new_tokens=16, do_sample=False).tolist())
    theirs.set_attn_implementation("sdpa")  # its default, in bf16 the more exact of the two
    bf16, theirs_bf16 = ours_bf16(ids) - wanted, theirs.to(torch.bfloat16)(ids).logits - wanted
    largest = wanted.abs().max().item()
    return {
        "largest_logit": largest,
        "fp32_bound": rounding_bound(config, length, largest),
        "fp32": fp32.abs().max().item(),
        "bf16_rms": bf16.square().mean().sqrt().item(),
        "bf16_rms_transformers": theirs_bf16.square().mean().sqrt().item(),
        "bf16": bf16.abs().max().item(),
        "bf16_transformers": theirs_bf16.abs().max().item(),
        "greedy_equal": tokens[0] == tokens[1] == tokens[2],
    }
