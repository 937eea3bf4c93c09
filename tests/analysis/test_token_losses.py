"""Losses of two models token by token, compared with the log-softmax of their logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tinylab.analysis.token_losses import compare_tokens, text_losses, token_spans, token_texts
from tinylab.catalog.reference import load_model, load_tokenizer
from tinylab.config.architecture import Model
from tinylab.data.tokenizer.load import load_tokenizer_file, train_tokenizer
from tinylab.errors import EvaluationError
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run

TEXT = "The walk was long, said the wälker — and\nso  it was 🙂. The rest walked on for the whole long day."

SENTENCE = "Return a new list <b>containing</b> all items from the iterable, in $ascending$ order: über 你好."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.replace("🙂", "") * 20, "for while def return class " * 30], 320)


@pytest.fixture(scope="module")
def models():
    config = Model(vocab_size=320, n_layer=1, d_model=32, n_head=2, n_kv_head=1, d_ff=64, seq_len=16)
    pair = Llama(config).eval(), Llama(config).eval()
    for seed, model in enumerate(pair):
        model.init_weights(seed)
    return pair


def test_losses_are_those_of_the_logits_with_at_least_half_a_context(tokenizer, models):
    table, ids = compare_tokens(*models, tokenizer, TEXT), tokenizer.encode(TEXT)
    assert len(table) == len(ids) > 32 and list(table["position"]) == list(range(1, len(ids) + 1))
    stream = [tokenizer.eos_id, *ids]
    for i, loss in enumerate(table["loss_b"]):
        start = 0 if i < 16 else (i // 8 - 1) * 8
        with torch.no_grad():
            logs = models[1](torch.tensor([stream[start : i + 1]]))[0, -1].log_softmax(-1)
        assert loss == pytest.approx(-logs[ids[i]].item(), abs=1e-5), i
    assert (table["delta"] == table["loss_b"] - table["loss_a"]).all()
    assert all(TEXT[r.start : r.stop] == r.text for r in table.itertuples())


def test_spans_are_the_text_itself_even_across_several_bytes(tokenizer):
    spans = token_spans(tokenizer, tokenizer.encode(TEXT), TEXT)
    assert "".join(text for text, _, _ in spans) == TEXT
    assert all(TEXT[start:stop] == text for text, start, stop in spans)
    assert any(text.endswith("🙂") for text, _, _ in spans)


def test_spans_fall_back_to_each_tokens_own_text_when_the_tokenizer_rewrites(shared):
    unigram = load_tokenizer_file(shared / "tokenizers" / "sentencepiece_m" / "m.model")
    ids = unigram.encode("ﬁne   words")
    spans = token_spans(unigram, ids, "ﬁne   words")
    assert spans == [(text, -1, -1) for text in token_texts(unigram, ids)]


def test_a_text_without_tokens_is_refused(tokenizer, models):
    with pytest.raises(EvaluationError, match="the text must have 2 to 8192 tokens; found 0"):
        compare_tokens(*models, tokenizer, "")


def test_token_losses_equal_those_of_one_pass_of_transformers(lab: Path):
    import transformers

    folder = str(Run("tiny").checkpoints()[-1])
    tokenizer = load_tokenizer(folder)
    ids, losses = text_losses(load_model(folder, dtype=torch.float32), tokenizer, SENTENCE[:40])
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = torch.tensor([[tokenizer.eos_id, *ids]])
    with torch.no_grad():
        logs = peer(stream).logits.log_softmax(-1)
    expected = -logs[0, :-1].gather(1, stream[0, 1:, None])[:, 0]
    np.testing.assert_allclose(losses, expected, atol=1e-4)  # fp32, another order of sums


def test_each_token_of_a_text_longer_than_the_context_has_one_loss(lab: Path):
    folder = str(Run("tiny").checkpoints()[-1])
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    short, long = SENTENCE, SENTENCE * 6
    ids, losses = text_losses(model, tokenizer, long)
    assert len(ids) == len(losses) > model.config.seq_len
    context = model.config.seq_len
    np.testing.assert_allclose(losses[:10], text_losses(model, tokenizer, short)[1][:10], atol=1e-4)
    at = context + 3  # inside the second window, which begins half a context before the first new token
    start = context - context // 2
    window = torch.tensor([[tokenizer.eos_id, *ids][start : at + 2]])
    with torch.no_grad():
        expected = -model(window[:, :-1]).log_softmax(-1)[0, -1, window[0, -1]]
    assert losses[at] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(EvaluationError, match="2 to 8192 tokens; found 0"):
        text_losses(model, tokenizer, "")


def test_token_texts_join_to_the_text(lab: Path):
    tokenizer = load_tokenizer("tiny")
    ids = tokenizer.encode(SENTENCE)
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)
