"""Where two models differ on a text: the loss of every token under each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas
import torch

from tinylab.errors import EvaluationError
from tinylab.model.loss import token_losses

if TYPE_CHECKING:
    from tinylab.data.tokenizer.encode import Tokenizer
    from tinylab.model.transformer import Llama

MOST_TOKENS = 8192
"""Longest text, in tokens: nobody reads a longer one token by token."""


def text_losses(model: Llama, tokenizer: Tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Token ids of `text`, and the loss of each in nats given the tokens before it.

    As in training, the text follows a document boundary (EOS, else BOS). Without either, the first token is not
    predicted and the list of losses starts at the second. A text longer than the model's context is read in windows of
    seq_len tokens that overlap by half, so that each later token has at least half a context before it.
    Raises EvaluationError for an empty or overlong text, or a tokenizer that does not fit the model.
    """
    ids = tokenizer.encode(text)
    if not 1 < len(ids) <= MOST_TOKENS:
        raise EvaluationError(f"the text must have 2 to {MOST_TOKENS} tokens; found {len(ids)}")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise EvaluationError(
            f"tokenizer and model must have vocabularies of one size; found {tokenizer.vocab_size} and "
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
    """One row per predicted token: `position` (from 1), `id`, `text`, `start`, `stop`, `loss_a`, `loss_b`, `delta`.

    start and stop count characters of `text`; losses are in nats; delta is B − A, negative where B predicts better.
    """
    ids, a = text_losses(model_a, tokenizer, text)
    _, b = text_losses(model_b, tokenizer, text)
    rows = [
        {"position": i + 1, "id": token, "text": shown, "start": start, "stop": stop}
        for i, (token, (shown, start, stop)) in enumerate(zip(ids, token_spans(tokenizer, ids, text), strict=True))
    ]
    table = pandas.DataFrame(rows[len(ids) - len(a) :])
    return table.assign(loss_a=a, loss_b=b, delta=[y - x for x, y in zip(a, b, strict=True)])


def token_spans(tokenizer: Tokenizer, ids: list[int], text: str) -> list[tuple[str, int, int]]:
    """(text, start, stop) of each token, in characters of `text`; a character split over several ids goes to the last.

    Where the tokenizer rewrites the text (so that the bytes do not add up), the texts are `token_texts` and the offsets
    are -1.
    """
    sizes = [int(size) for size in tokenizer.token_bytes()[ids]]
    characters = [i for i, c in enumerate(text) for _ in c.encode()]  # of each byte
    surplus = sum(sizes) - len(characters)
    if surplus not in (0, 1):  # 1: a Llama-style tokenizer begins every text with a space of its own
        return [(shown, -1, -1) for shown in token_texts(tokenizer, ids)]
    characters.append(len(text))
    spans, byte = [], -surplus
    for size in sizes:
        start, stop = characters[max(byte, 0)], characters[max(byte + size, 0)]
        spans.append((text[start:stop], start, stop))
        byte += size
    return spans


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each id adds to the decoded text; a character split over several ids goes to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:end])
        if end < len(ids):  # bytes of an unfinished character, and those before them in its run, decode to U+FFFD
            decoded = max(shown, decoded.rstrip("\ufffd"), key=len)
        texts.append(decoded[len(shown) :])
        shown = decoded
    return texts
