"""Causal attention: one function per implementation ("backend"), all of one signature.

    softmax(q kᵀ / sqrt(D)) v    q (B, H, T, D); k, v (B, K, S, D), each key head serving H/K query heads in a row

The last of the T queries sees all S keys, so a key-value cache needs no mask of its own. Documents are numbers (B, T),
equal for tokens of one document: attention stays inside it. Only the kernels of torch that know nothing else get a
dense mask made of them. Letters: B batch, T queries, S keys, H query heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_mask(documents: Tensor) -> Tensor:
    """The causal mask (B, 1, T, T), True where a query may look: its own document up to itself; documents (B, T)."""
    length = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()


def document_lengths(documents: Tensor) -> Tensor:
    """Lengths of the documents, row after row, as int32; a document ends with its row. documents (B, T)."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([documents.numel()])])
    return (ends - starts).to(torch.int32)


@dataclass(frozen=True)
class Backend:
    """One implementation of attention."""

    name: str
    """What `parallel.attention` calls it."""
    attend: Callable[..., Tensor]
    """q, k, v and `documents`, prepared by the function below or None; returns (B, H, T, D)."""
    documents: Callable[[Tensor], Any] | None = None
    """Prepares documents (B, T), once per forward pass for all layers; None where it cannot keep them apart."""


def _sdpa(kernel: SDPBackend | None) -> Callable[..., Tensor]:
    """torch's scaled_dot_product_attention by one of its kernels, or by the one that torch chooses."""

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        if kernel is SDPBackend.EFFICIENT_ATTENTION:  # it refuses grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        mask = documents
        if mask is None and 1 < queries < keys and kernel is SDPBackend.FLASH_ATTENTION and q.is_cuda:
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler

            mask = causal_lower_right(queries, keys)  # it takes no dense mask
        elif mask is None and 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        causal = mask is None and queries > 1
        if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # torch's CPU kernel is slower in bf16 than in fp32 without AMX: forward and backward of (16, 6, 256, 32)
            # took 44 ms against 23 ms, best of 12 on two cores of an AMD EPYC with AVX512_BF16, torch 2.13.
            with torch.autocast("cpu", enabled=False):
                return chosen(q.float(), k.float(), v.float(), mask, causal, grouped)
        return chosen(q, k, v, mask, causal, grouped)

    def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> Tensor:
        if kernel is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Dao-AILab's flash-attn 2: grouped heads, and documents as lengths."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    B, H, T, D = q.shape
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if documents is None:
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    bounds = F.pad(documents.cumsum(0, dtype=torch.int32), (1, 0))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(q, k, v, bounds, bounds, T, T, causal=True)
    return out.view(B, T, H, D).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention: heads repeated for their group, documents as lengths."""
    from xformers import ops  # pyright: ignore[reportMissingImports]
    from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

    B, H, T, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if documents is None:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(documents.tolist())
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias).view(B, T, H, D).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
    """torch's FlexAttention over blocks of keys that a query may see; compiled on CUDA, its only fast form."""
    blocks = _causal_blocks(q.shape[2], k.shape[2], q.device) if documents is None else documents
    q, k = q.to(v.dtype), k.to(v.dtype)
    out = _flex_function(q.is_cuda)(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return out[0] if isinstance(out, tuple) else out


@cache
def _flex_function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


@lru_cache(maxsize=8)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + (keys - queries)

    with torch.inference_mode(False):  # generation may ask first, and a backward pass takes no inference tensor
        return create_block_mask(visible, None, None, queries, keys, device=str(device))


def _document_blocks(documents: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (documents[b, i] == documents[b, j])

    return create_block_mask(visible, len(documents), None, *[documents.shape[1]] * 2, device=str(documents.device))


TORCH = Backend("torch", _sdpa(None), dense_mask)
"""The kernel that torch itself chooses: what runs where nothing was asked for."""

BACKENDS = {
    b.name: b
    for b in (
        TORCH,
        Backend("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        Backend("flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
        Backend("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), dense_mask),
        Backend("math", _sdpa(SDPBackend.MATH), dense_mask),
        Backend("flash-attn", _flash_attn, document_lengths),
        Backend("xformers", _xformers, document_lengths),
        Backend("flex", _flex, _document_blocks),
    )
}
