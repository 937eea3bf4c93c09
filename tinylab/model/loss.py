"""The one loss: negative log-likelihood of the next token in nats, for training, validation, analysis and evaluation.

Logits are made a few rows at a time and never exist all at once. Letters: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylab.model.transformer import Llama

IGNORED = -100
"""A target that has no loss: what follows the end of a document, where documents are kept apart."""


def log_softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits) (N, V), and its value at each target (N,), 0 where the target is IGNORED; both fp32.

    The second, negated, is the loss. logits (N, V) of any dtype, targets (N,) int64.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return log_p, log_p.gather(1, targets[:, None].clamp(min=0))[:, 0] * (targets != IGNORED)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits made at once: few enough to stay in a CPU's cache, many enough to keep a GPU busy.

    The CPU time of a step of the `tiny` preset differed by less than 3% between 2^18 and 2^21 elements.
    """
    elements = 2**20 if device.type == "cpu" else 2**27
    return max(128, elements // vocab_size)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads."""

    inputs: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64; IGNORED where there is no loss, as between two documents under data.document_mask."""
    document_ids: Tensor | None
    """(B, T) int32, number of the token's document within its row; None where each row is one text."""

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def sequences(self) -> Iterator[MicroBatch]:
        """The same samples, each in a micro-batch of its own."""
        return (self._each(lambda tensor, row=row: tensor[row : row + 1]) for row in range(len(self.inputs)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        documents = self.document_ids
        return MicroBatch(change(self.inputs), change(self.targets), None if documents is None else change(documents))


def loss_sum(model: Llama, batch: MicroBatch) -> Tensor:
    """Sum of the losses of a micro-batch in nats: scalar, fp32. Divide by the targets that count, not by rows."""
    hidden = model.hidden(batch.inputs, document_ids=batch.document_ids)
    return linear_cross_entropy(hidden, model.head.weight, batch.targets)


@torch.no_grad()
def token_losses(model: Llama, ids: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Loss of every target in nats (B, T), fp32; 0 where the target is IGNORED."""
    hidden = model.hidden(ids, document_ids=document_ids).flatten(0, 1)
    rows = chunk_rows(model.config.vocab_size, hidden.device)
    chunks = zip(hidden.split(rows), targets.flatten().split(rows), strict=True)
    return torch.cat([-log_softmax_at(model.head(h), t)[1] for h, t in chunks]).view(targets.shape)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets of -log softmax(hidden · weightᵀ)[target], fp32 scalar.

    hidden (…, C), weight (V, C), targets (…) int64 or IGNORED. Products are in autocast's dtype where it is on,
    everything between them in fp32. The gradient is made in the forward pass, while a chunk's logits are at hand.
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
            log_p, at_target = log_softmax_at(h[chunk] @ w.t(), targets[chunk])
            total -= at_target.sum()
            if grad_h is not None and grad_w is not None:
                # d loss / d logits = softmax - one-hot, and 0 where there is no loss
                index = targets[chunk, None].clamp(min=0)
                grad = log_p.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
                grad = grad.mul_((targets[chunk] != IGNORED)[:, None]).to(dtype)
                grad_h[chunk] = grad @ w
                grad_w += grad.t() @ h[chunk]
        if grad_h is not None and grad_w is not None:
            ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * upstream[0].to(grad_h.dtype), grad_w * upstream[0].to(grad_w.dtype), None, None, None
