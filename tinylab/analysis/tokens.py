"""Where two models differ in a text: loss of every token under both, what gained and lost most, loss by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tinylab.errors import EvaluationError
from tinylab.model.loss import token_losses

if TYPE_CHECKING:
    import pandas

    from tinylab.data.tokenizer import Tokenizer
    from tinylab.model.transformer import Llama

MOST_TOKENS = 8192
"""Longest text in tokens; more would not be looked at one by one."""


def text_losses(model: Llama, tokenizer: Tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Ids of `text` and the loss of each in nats, given everything before it.

    The text stands behind a document boundary (EOS, else BOS), as in training; without either, the first token is not
    predicted and its loss is missing from the list's beginning. Texts longer than the model's context are read in
    windows of seq_len tokens that overlap by half, so that every later token has at least half a context before it.
    Raises EvaluationError for an empty or overlong text, or a tokenizer that does not fit the model.
    """
    ids = tokenizer.encode(text)
    if not 1 < len(ids) <= MOST_TOKENS:
        raise EvaluationError(f"the text must have 2 to {MOST_TOKENS} tokens; found {len(ids)}")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise EvaluationError(
            f"tokenizer and model must have one vocabulary; found {tokenizer.vocab_size} and "
            f"{model.config.vocab_size} ids"
        )
    prefix = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    stream = ids if prefix is None else [prefix, *ids]
    size = model.config.seq_len
    device = next(model.parameters()).device
    losses: list[float] = []
    while len(losses) < len(stream) - 1:
        start = max(0, len(losses) - size // 2) if losses else 0
        window = torch.tensor(stream[start : start + size + 1], device=device)
        found = token_losses(model, window[None, :-1], window[None, 1:])[0]
        losses += found[len(losses) - start :].tolist()
    return ids, losses


def compare_tokens(model_a: Llama, model_b: Llama, tokenizer: Tokenizer, text: str) -> pandas.DataFrame:
    """One row per predicted token: `position` (from 1), `id`, `text`, `loss_a`, `loss_b`, `delta` (B − A), in nats."""
    import pandas

    ids, a = text_losses(model_a, tokenizer, text)
    _, b = text_losses(model_b, tokenizer, text)
    missing = len(ids) - len(a)
    table = pandas.DataFrame({"position": range(1, len(ids) + 1), "id": ids, "text": token_texts(tokenizer, ids)}).iloc[
        missing:
    ]
    return table.assign(loss_a=a, loss_b=b, delta=[y - x for x, y in zip(a, b, strict=True)]).reset_index(drop=True)


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the decoded text; a character of several ids stands at the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        whole = whole.rstrip("\ufffd") if end < len(ids) else whole
        texts.append(whole[len(shown) :] if whole.startswith(shown) else whole)
        shown = whole
    return texts
