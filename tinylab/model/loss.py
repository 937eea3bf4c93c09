"""The one loss: negative log-likelihood of the next token in nats, used by training, validation and analysis alike.

Logits are made a few rows at a time and never exist whole. Letters: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tinylab.model.transformer import Llama

IGNORED = -100
"""A target that counts nothing, e.g. across a document's boundary."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits made at once: few enough to stay in a CPU's cache, many enough to keep a GPU busy.

    The CPU time of a step of the `tiny` preset differed by less than 3% between 2^18 and 2^21 elements.
    """
    elements = 2**20 if device.type == "cpu" else 2**27
    return max(128, elements // vocab_size)


class Batch(Protocol):
    """What a micro-batch has; it need not be writable."""

    @property
    def inputs(self) -> Tensor:
        """(B, T) int64."""
        raise AssertionError

    @property
    def targets(self) -> Tensor:
        """(B, T) int64; IGNORED where there is no loss."""
        raise AssertionError

    @property
    def document_ids(self) -> Tensor | None:
        """(B, T), number of the token's document within its row; None where rows are one text."""
        raise AssertionError


def loss_sum(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Sum of the losses of a micro-batch in nats: scalar, fp32. Divide by the targets that count, not by rows."""
    return model(batch.inputs, batch.targets, document_ids=batch.document_ids)


@torch.no_grad()
def token_losses(model: Llama, ids: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Loss of every target in nats (B, T), fp32; 0 where the target is -100."""
    hidden = model.hidden(ids, document_ids=document_ids).flatten(0, 1)
    rows = chunk_rows(model.config.vocab_size, hidden.device)
    chunks = zip(hidden.split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(model.head(h).float(), t, reduction="none", ignore_index=IGNORED) for h, t in chunks]
    return torch.cat(losses).view(targets.shape)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets of -log softmax(hidden · weightᵀ)[target], fp32 scalar.

    hidden (…, C), weight (V, C), targets (…) int64 with -100 for none. Products are in autocast's dtype where it is
    on, everything between them in fp32. The gradient is made in the forward pass, while a chunk's logits are at hand.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), dtype, wants_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, wants_grad: bool
    ) -> Tensor:
        h, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), device=h.device)
        grad_h = torch.empty_like(h) if wants_grad else None
        grad_w = torch.zeros(w.shape, device=w.device) if wants_grad else None
        rows = chunk_rows(w.shape[0], h.device)
        for start in range(0, h.shape[0], rows):
            chunk = slice(start, start + rows)
            counts = (targets[chunk] != IGNORED)[:, None]
            index = targets[chunk, None].clamp(min=0)
            log_p = torch.log_softmax(h[chunk] @ w.t(), dim=-1, dtype=torch.float32)
            total -= (log_p.gather(1, index) * counts).sum()
            if grad_h is not None and grad_w is not None:
                # d loss / d logits = softmax - one-hot
                grad = log_p.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                grad = grad.mul_(counts).to(dtype)
                grad_h[chunk] = grad @ w
                grad_w += grad.t() @ h[chunk]
        if grad_h is not None and grad_w is not None:
            ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * upstream[0].to(grad_h.dtype), grad_w * upstream[0].to(grad_w.dtype), None, None, None
