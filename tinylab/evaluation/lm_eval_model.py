"""lm-eval's view of our model: likelihoods of continuations, computed in process with our own weights and tokenizer.

Letters: N requests of a batch, T tokens, C model width, V vocabulary.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.errors import EvaluationError
from tinylab.evaluation.batches import Batch, Row, batches
from tinylab.model.cache import KVCache
from tinylab.model.generate import generate_ids
from tinylab.model.loss import chunk_rows, log_softmax_at
from tinylab.model.transformer import Llama

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as texts, ids of the context, ids of the continuation."""


class TinylabLM(TemplateLM):
    """A Llama and its tokenizer as lm-eval's language model.

    add_bos: whether BOS goes before every prompt, whatever lm-eval's default (it changed in 2025).
    prefix_id: what replaces an empty context; default: EOS, or BOS where there is no EOS.
    max_tokens: padded tokens of a batch. Equal requests run once, and so does a context shared by several choices
    (evaluation/batches.py).
    `truncated` holds the requests whose context was cut on the left.
    """

    backend = "causal"

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        add_bos: bool = False,
        prefix_id: int | None = None,
        max_tokens: int = 8192,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise EvaluationError(
                f"the tokenizer's {tokenizer.vocab_size} ids must fit the model's {model.config.vocab_size} rows; "
                "they belong to different models. Use the model's own tokenizer"
            )
        if prefix_id is None:
            prefix_id = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
        if prefix_id is None or (add_bos and tokenizer.bos_id is None):
            raise EvaluationError(
                "the tokenizer must have BOS or EOS (an empty context needs one), and BOS where the profile adds it; "
                f"found BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}"
            )
        self.model, self.text = model, tokenizer
        self.add_bos, self.prefix_id, self.max_tokens, self.progress = add_bos, prefix_id, max_tokens, progress
        self.max_length = model.config.seq_len
        self._device = next(model.parameters()).device
        self.truncated: set[tuple[str, str]] = set()
        self._encoded: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The id between documents."""
        return self.prefix_id if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that replaces an empty context."""
        return self.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, after BOS if this model adds it and `add_special_tokens` is not False."""
        ids = self._encoded.get(string) or self.text.encode(string)
        if self.add_bos and add_special_tokens is not False and self.text.bos_id is not None:
            return [self.text.bos_id, *ids]
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Like lm-eval's, but all strings are first encoded together rather than one by one."""
        pairs = [r.args for r in requests]  # as TemplateLM._encode_pair spells them: spaces go to the choice
        ordered = sorted({context + choice for context, choice in pairs} | {c.rstrip() for c, _ in pairs if c})
        batch = self.text.encode_batch(ordered)
        self._encoded = {text: ids.tolist() for text, ids in zip(ordered, batch, strict=True)}
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would produce it) of each continuation."""
        rows: dict[Row, list[int]] = {}
        for i, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise EvaluationError(f"a choice must have at least one token; found {texts[1]!r} after {texts[0]!r}")
            ids = (context or [self.prefix_id]) + continuation
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"a choice of {len(continuation)} tokens does not fit the model's {self.max_length}; "
                    f"leave this task out for a model of so short a context: {texts[1][:60]!r}"
                )
            if len(ids) > self.max_length + 1:
                self.truncated.add(texts)
            rows.setdefault((tuple(ids[-(self.max_length + 1) :]), len(continuation)), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        plan = list(batches(rows, self.max_tokens))
        for batch in tqdm(plan, "scoring", unit="batch", leave=False, file=sys.stderr, disable=not self.progress):
            for row, answer in zip(batch.rows, self._score(batch), strict=True):
                for i in rows[row]:
                    answers[i] = answer
        return answers

    @torch.inference_mode()
    def _score(self, batch: Batch) -> list[tuple[float, bool]]:
        """The answers of a batch's rows; the head runs only where a token of a continuation is predicted.

        Log-likelihoods are summed in fp64 on the CPU.
        """
        hidden = self._hidden_shared(batch.rows, batch.shared) if batch.shared else self._hidden(batch.rows)
        targets = torch.tensor([t for ids, count in batch.rows for t in ids[-count:]], device=self._device)
        size = chunk_rows(self.model.config.vocab_size, hidden.device)
        logs, hits = [], []
        for h, t in zip(hidden.split(size), targets.split(size), strict=True):
            logits = self.model.head(h)
            logs.append(log_softmax_at(logits, t)[1])
            hits.append(logits.argmax(1) == t)
        counts = [count for _, count in batch.rows]
        parts = zip(torch.cat(logs).double().cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True)
        return [(float(log.sum()), bool(hit.all())) for log, hit in parts]

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """What the head reads (sum of counts, C), row after row; every row runs with its context."""
        ids = _padded([ids[:-1] for ids, _ in rows])
        width = ids.shape[1]
        ends = [i * width + len(ids) - 1 for i, (ids, _) in enumerate(rows)]
        where = [t for end, (_, count) in zip(ends, rows, strict=True) for t in range(end - count, end)]
        hidden = self.model.hidden(ids.to(self._device)).flatten(0, 1)
        return hidden[torch.tensor(where, device=self._device)]

    def _hidden_shared(self, rows: Sequence[Row], length: int) -> Tensor:
        """The same for rows whose contexts all have `length` tokens: each distinct context runs once.

        The last token of a context predicts the first of every continuation. The rest of each continuation runs on a
        copy of the context's keys and values; the padding is on the right, where causal attention does not look.
        """
        places: dict[tuple[int, ...], int] = {}
        owners = [places.setdefault(ids[:length], len(places)) for ids, _ in rows]
        owner, weight = torch.tensor(owners, device=self._device), self.model.embed.weight
        cache = KVCache(self.model.config, len(places), length, device=self._device, dtype=weight.dtype)
        hidden = self.model.hidden(torch.tensor(list(places), device=self._device), cache=cache)[:, -1:][owner]
        rest = _padded([ids[length:-1] for ids, _ in rows]).to(self._device)
        if rest.shape[1]:
            copies = _copies(cache, owner, self.model, length + rest.shape[1])
            hidden = torch.cat([hidden, self.model.hidden(rest, cache=copies)], dim=1)
        counts = torch.tensor([count for _, count in rows], device=self._device)
        return hidden[torch.arange(hidden.shape[1], device=self._device) < counts[:, None]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text; every token is predicted once, with as much context as fits."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            encoded = [(("", ""), *make_disjoint_window(window)) for window in windows]
            answers = self._loglikelihood_tokens(encoded)
            results.append(sum(likelihood for likelihood, _ in answers))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut before the first of its `until` strings that occurs."""
        results = []
        for context, settings in (request.args for request in requests):
            until = settings.get("until") or []
            count = int(settings.get("max_gen_toks", 256))
            room = self.max_length - count
            if room < 1:
                raise EvaluationError(f"max_gen_toks ({count}) must be below the model's {self.max_length} tokens")
            ids = self.tok_encode(context)
            if len(ids) > room:
                self.truncated.add((context, ""))
            ids = ids[-room:] or [self.prefix_id]
            output = generate_ids(
                self.model, torch.tensor([ids], device=self._device), count, temperature=0.0, eos_id=self.text.eos_id
            )
            text = self.text.decode(output[0, len(ids) :].tolist())
            stops = [u for u in ([until] if isinstance(until, str) else until) if u]
            results.append(text[: min((text.find(u) for u in stops if u in text), default=len(text))])
        return results


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


def _copies(cache: KVCache, owner: Tensor, model: Llama, size: int) -> KVCache:
    """A cache with room for `size` tokens whose row i holds what row owner[i] of `cache` holds."""
    copies = KVCache(model.config, len(owner), size, device=owner.device, dtype=cache.keys[0].dtype)
    for ours, theirs in ((copies.keys, cache.keys), (copies.values, cache.values)):
        for mine, other in zip(ours, theirs, strict=True):
            mine[:, :, : cache.length] = other[owner, :, : cache.length]
    copies.length = cache.length
    return copies
