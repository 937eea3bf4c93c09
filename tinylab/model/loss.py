"""The one loss: negative log-likelihood of the next token in nats, used by training, validation and analysis alike.

Logits are made a few rows at a time and never exist whole. Letters: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tinylab.model.transformer import Llama

IGNORED = -100
"""A target that counts nothing, e.g. across a document's boundary."""
CHUNK_ELEMENTS = 2**21
"""Logits made at once."""


class Batch(Protocol):
    """What a micro-batch has: inputs and targets (B, T) int64, document_ids (B, T) or None."""

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None


def loss_sum(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Sum of the losses of a micro-batch in nats: scalar, fp32. Divide by the targets that count, not by rows."""
    return model(batch.inputs, batch.targets, document_ids=batch.document_ids)


@torch.no_grad()
def token_losses(model: Llama, ids: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Loss of every target in nats (B, T), fp32; 0 where the target is -100."""
    hidden = model.hidden(ids, document_ids=document_ids).flatten(0, 1)
    rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    chunks = zip(hidden.split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(model.head(h).float(), t, reduction="none", ignore_index=IGNORED) for h, t in chunks]
    return torch.cat(losses).view(targets.shape)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets of -log softmax(hidden · weightᵀ)[target], fp32 scalar.

    hidden (…, C), weight (V, C), targets (…) int64 with -100 for none. Under autocast the product is in its dtype.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    total = torch.zeros((), device=hidden.device)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum", ignore_index=IGNORED)
    return total
