"""The elementwise parts of a block, each with the backward pass written out.

Autograd's own would store and re-read several (B, T, C) or (B, T, F) intermediates; on a CPU these products of
a few millions of numbers are bound by memory, not by arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, rounded where transformers' LlamaRMSNorm rounds; x (…, C), weight (C,)."""
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (…, F) of gate_up (…, 2F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
