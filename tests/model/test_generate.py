"""Generation against transformers' own, against no cache, and against probabilities counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinylab.config.architecture import Model, RopeScaling
from tinylab.errors import ConfigError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.model.cache import KVCache
from tinylab.model.generate import _choose, generate, generate_ids
from tinylab.model.transformer import Llama

SMALL = Model(
    vocab_size=61, n_layer=2, d_model=48, n_head=4, n_kv_head=2, d_ff=80, seq_len=64, init="normal", init_std=0.2
)
SHAPES = {
    "grouped": SMALL,
    "multi-query": replace(SMALL, n_kv_head=1),
    "one key head each": replace(SMALL, n_kv_head=4),
    "tied": replace(SMALL, tie_embeddings=True),
    "llama3 rope": replace(SMALL, rope_scaling=RopeScaling(original_seq_len=16), rope_theta=5e5),
}


def model(config: Model = SMALL) -> Llama:
    result = Llama(config)
    result.init_weights(7)
    return result.eval()


def prompt(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_with_and_without_cache_and_transformers_agree_token_by_token(shape: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    ours = model(SHAPES[shape])
    save_weights(ours.state_dict(), ours.config, tmp_path)
    write_config(ours.config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt()
    cached = generate_ids(ours, ids, 40)
    assert torch.equal(cached, generate_ids(ours, ids, 40, use_cache=False))
    wanted = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert torch.equal(cached, wanted)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_logits_do_not_depend_on_where_the_cache_was_cut(cut: int):
    ours, ids = model(), prompt(length=13)
    cache = KVCache(ours.config, 2, 13, dtype=torch.float32)
    with torch.inference_mode():
        pieces = [ours(piece, cache=cache) for piece in ids.split(cut, dim=1)]
        whole = ours(ids)
    # fp32 sums in another order, logits of order 1.
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-5


def test_a_full_cache_is_refused():
    ours = model()
    cache = KVCache(ours.config, 2, 4, dtype=torch.float32)
    with pytest.raises(ConfigError, match="has room for 4 tokens; found 5"):
        ours(prompt(), cache=cache)


def test_equal_seeds_sample_equal_tokens_whatever_the_global_state():
    ours, ids = model(), prompt()
    torch.manual_seed(1)
    first = generate_ids(ours, ids, 20, temperature=1.0, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, generate_ids(ours, ids, 20, temperature=1.0, seed=5))
    assert not torch.equal(first, generate_ids(ours, ids, 20, temperature=1.0, seed=6))


def test_a_row_that_ended_is_filled_with_the_end():
    ours, ids = model(), prompt()
    free = generate_ids(ours, ids, 20)
    eos = int(free[0, 8])
    ended = generate_ids(ours, ids, 20, eos_id=eos)
    assert ended.shape[1] <= free.shape[1]
    for row, wanted in zip(ended[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        stop = wanted.index(eos) if eos in wanted else len(wanted)
        assert row == (wanted[: stop + 1] + [eos] * len(row))[: len(row)]


PROBABILITIES = [0.5, 0.25, 0.15, 0.1]


def frequencies(**options) -> list[float]:
    """How often each of four tokens is drawn in 20,000 rows."""
    logits = torch.tensor(PROBABILITIES).log().expand(20_000, 4)
    values = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    chosen = _choose(logits, **values, generator=torch.Generator().manual_seed(0))
    return (torch.bincount(chosen, minlength=4) / 20_000).tolist()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"temperature": 0.5}, [p * p / sum(q * q for q in PROBABILITIES) for p in PROBABILITIES]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, PROBABILITIES),
    ],
)
def test_sampling_draws_with_the_probabilities_worked_out_by_hand(options: dict, wanted: list[float]):
    # 20,000 draws: the standard error is at most 0.0035; 4 of them.
    assert frequencies(**options) == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and at least 0; found -1.0"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        generate_ids(model(), prompt(), **({"max_new_tokens": 3} | options))


class Letters:
    """A tokenizer of 60 characters; id 60 ends a text."""

    bos_id, eos_id = None, 60
    letters = "".join(map(chr, range(64, 124)))

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i] for i in ids)


def test_text_is_the_decoded_continuation_without_the_prompt():
    ours, letters = model(), Letters()
    ids = generate_ids(ours, torch.tensor([letters.encode("HELLO")]), 12, eos_id=60)[0, 5:].tolist()
    assert generate(ours, letters, "HELLO", max_new_tokens=12) == letters.decode([i for i in ids if i != 60])
    assert isinstance(generate(ours, letters, "", max_new_tokens=3), str)
    with pytest.raises(ConfigError, match="found a lone surrogate at character 1. Remove it"):
        generate(ours, letters, "A\udcff")
