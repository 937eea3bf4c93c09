"""Causal attention, and which of its implementations work on a device.

Letters: B batch, T queries, S keys, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v as (B, H, T, D); each K head serves H/K query heads in a row.

    q (B, H, T, D); k, v (B, K, S, D). Without a mask attention is causal, the last query seeing all S keys;
    a single query needs no mask at all. `mask` (B, 1, T, S) bool: True where a query may look.
    """
    queries, keys, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if mask is None and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    causal = mask is None and queries > 1
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # torch's CPU kernel is slower in bf16 than in fp32 without AMX: forward and backward of (16, 6, 256, 32) took
        # 44 ms against 23 ms, best of 12 on two cores of an AMD EPYC with AVX512_BF16, torch 2.13.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def document_mask(document_ids: Tensor) -> Tensor:
    """The causal mask (B, 1, T, T) that keeps attention inside a document; document_ids (B, T) integers."""
    length = document_ids.shape[1]
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()


def backends(device: str | torch.device, dtype: torch.dtype, head_size: int = 64) -> dict[str, str | None]:
    """Every attention implementation: None where a tiny forward and backward ran here, else why it does not."""
    trials: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        name: _sdpa_only(backend) for name, backend in _SDPA.items()
    }
    trials |= {"flex": _flex, "flash-attn": _flash_attn, "xformers": _xformers}
    return {name: _reason_not_live(trial, device, dtype, head_size) for name, trial in trials.items()}


def _reason_not_live(
    trial: Callable[[Tensor, Tensor, Tensor], Tensor], device: str | torch.device, dtype: torch.dtype, head_size: int
) -> str | None:
    """None if the trial gives the right result and gradients on (1, 2, 16, D) inputs, else one line."""
    import warnings

    try:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, 2, 16, head_size, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = trial(q, k, v)
            out.sum().backward()
            with sdpa_kernel([SDPBackend.MATH]):
                wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        if q.grad is None or not bool(torch.isfinite(q.grad).all()):
            return "its backward pass gives no finite gradient"
        worst = (out.float() - wanted).abs().max().item()
        return None if worst < 0.05 else f"its output differs from the math backend by {worst:.3g}"
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a capability is whatever runs: any failure is the reason
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def _sdpa_only(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device=str(q.device))
    run = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    out = run(q, k, v, block_mask=mask)
    return out[0] if isinstance(out, tuple) else out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers import ops  # pyright: ignore[reportMissingImports]

    bias = ops.LowerTriangularMask()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
