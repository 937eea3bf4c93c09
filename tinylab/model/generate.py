"""Text from a model, token by token: a preallocated key-value cache, greedy or sampled.

Letters: B batch, T tokens, K key-value heads, S tokens of room, D head size, V vocabulary.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from tinylab.errors import ConfigError
from tinylab.model.cache import KVCache
from tinylab.model.transformer import Llama


class TextTokenizer(Protocol):
    """What `generate` needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@torch.inference_mode()
def generate_ids(
    model: Llama,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """ids (B, T) and the tokens that follow, int64 (B, T + n): n = max_new_tokens, or fewer when every row has ended.

    Temperature 0 takes the likeliest token (the first of equals). Otherwise logits are divided by it, all but the
    `top_k` likeliest are dropped, then all but the fewest that hold `top_p` of the probability, and `seed` draws.
    A row that has given `eos_id` is filled up with it. Raises ConfigError for values that cannot be used.
    """
    _check(ids, max_new_tokens, temperature, top_k, top_p)
    model.eval()
    B, T = ids.shape
    out = torch.empty(B, T + max_new_tokens, dtype=torch.int64, device=ids.device)
    out[:, :T] = ids
    weight = model.embed.weight
    size = T + max_new_tokens - 1
    cache = KVCache(model.config, B, size, device=weight.device, dtype=weight.dtype) if use_cache else None
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
    for end in range(T, T + max_new_tokens):
        new = out[:, :end] if cache is None else out[:, cache.length : end]
        # Only the last position's logits are wanted: the head runs on one token a row.
        logits = model.head(model.hidden(new, cache=cache)[:, -1])
        chosen = _choose(logits.float(), temperature, top_k, top_p, generator)
        if eos_id is not None:
            chosen = torch.where(ended, eos_id, chosen)
            ended |= chosen == eos_id
        out[:, end] = chosen
        if eos_id is not None and bool(ended.all()):
            return out[:, : end + 1]
    return out


def generate(
    model: Llama,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text that the model writes after `prompt`, without it, up to the end of the document.

    An empty prompt begins with the tokenizer's beginning-of-text id, or its end-of-text id. Temperature 0 gives the
    likeliest continuation; see `generate_ids` for the rest. Raises ConfigError for values that cannot be used.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start}"
        raise ConfigError(f"prompt must be text that UTF-8 can hold; found {found}. Remove it") from error
    ids = tokenizer.encode(prompt)
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if start is None:
            raise ConfigError("prompt must hold some text, because this tokenizer has no id that begins one; found ''")
        ids = [start]
    given = torch.tensor([ids], device=model.embed.weight.device)
    eos_id = tokenizer.eos_id
    new = generate_ids(model, given, max_new_tokens, temperature, top_k, top_p, seed, eos_id)[0, len(ids) :].tolist()
    return tokenizer.decode([i for i in new if i != eos_id])


def _check(ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    problems = []
    if ids.ndim != 2 or ids.shape[1] < 1:
        problems.append(f"ids must be of shape (B, T) with T at least 1; found {tuple(ids.shape)}")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens must be at least 0; found {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(f"temperature must be finite and at least 0; found {temperature}")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k must be at least 1, or absent; found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p must lie above 0 and at most 1, or be absent; found {top_p}")
    if problems:
        raise ConfigError("; ".join(problems))


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """The next token of each row (B,) from its logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # Dropped when those before it hold top_p already; so the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
