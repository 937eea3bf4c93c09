"""A context with several choices runs once: the same answers as request by request, and fewer tokens computed."""

from __future__ import annotations

import random

import pytest
import torch

from tinylab.catalog.reference import load_model, load_tokenizer
from tinylab.evaluation import batches as planning
from tinylab.evaluation.batches import batches
from tinylab.evaluation.lm_eval_model import TinylabLM
from tinylab.evaluation.probes import build_probe
from tinylab.evaluation.score_model import run_task
from tinylab.evaluation.tasks import probe


@pytest.fixture(scope="module")
def parts(lab):
    return load_model(lab.checkpoints[1]), load_tokenizer(lab.checkpoints[1])


def _request(context: list[int], choice: list[int]):
    return (("c", "d"), context, choice)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 400) for _ in range(count)]


def _alone(model, context: list[int], choice: list[int]) -> tuple[float, bool]:
    """The answer from the logits of one plain forward pass: the oracle."""
    with torch.no_grad():
        logs = model(torch.tensor([(context + choice)[:-1]]))[0].log_softmax(-1)[-len(choice) :]
    return logs[range(len(choice)), choice].sum().item(), logs.argmax(-1).tolist() == choice


def _counted(lm: TinylabLM, requests, monkeypatch) -> tuple[list[tuple[float, bool]], int]:
    """Answers, and the ids that went through the model."""
    seen, hidden = [], lm.model.hidden
    with monkeypatch.context() as patch:
        patch.setattr(lm.model, "hidden", lambda ids, **more: seen.append(ids.numel()) or hidden(ids, **more))
        return lm._loglikelihood_tokens(requests), sum(seen)


@pytest.mark.parametrize("max_tokens", [8192, 300, 64])
def test_answers_are_those_of_each_request_alone(parts, max_tokens):
    """Contexts of several lengths, choices of one token and more, greedy ones, lone and repeated requests."""
    model, tokenizer = parts
    rng, requests = random.Random(3), []
    for length in (9, 30, 30, 30, 31, 60, 2, 1):
        context = _ids(rng, length)
        with torch.no_grad():
            best = int(model(torch.tensor([context]))[0, -1].argmax())
        sizes = rng.choice([(1, 1, 4, 7), (5, 5, 5, 5), (1, 1, 1, 1), (12, 3)])
        requests += [_request(context, _ids(rng, size)) for size in sizes]
        requests += [_request(context, [best]), _request(context, [best, 7])]
    requests += [_request(_ids(rng, 25), _ids(rng, 6)), requests[0]]
    rng.shuffle(requests)
    answers = TinylabLM(model, tokenizer, max_tokens=max_tokens)._loglikelihood_tokens(requests)
    for (_, context, choice), (value, greedy) in zip(requests, answers, strict=True):
        expected, flag = _alone(model, context, choice)
        assert value == pytest.approx(expected, abs=1e-4) and greedy == flag
    assert sum(greedy for _, greedy in answers) >= 8, "the greedy choices are there"


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", ["continuation", "code", "docstring"])
def test_probes_have_the_same_answers_without_sharing(lab, parts, monkeypatch, name, add_bos):
    """Through lm-eval, so with its empty contexts (the unconditional likelihoods) and its trailing spaces."""
    task = probe(name, build_probe(lab.shards, name)[:20], "test")
    lm = TinylabLM(*parts, add_bos=add_bos)
    shared, _ = run_task(lm, task)
    monkeypatch.setattr(planning, "MIN_SHARED_TOKENS", 10**9)
    alone, _ = run_task(lm, task)
    for mine, other in zip(shared, alone, strict=True):
        assert mine["greedy"] == other["greedy"]
        for key in ("loglikelihoods", "unconditional"):
            assert mine[key] == pytest.approx(other[key], abs=1e-4)


def test_a_context_is_computed_once_for_all_its_choices(parts, monkeypatch):
    rng = random.Random(4)
    contexts = [_ids(rng, 50) for _ in range(3)]
    requests = [_request(context, _ids(rng, 8)) for context in contexts for _ in range(4)]
    lm = TinylabLM(*parts)
    answers, tokens = _counted(lm, requests, monkeypatch)
    assert tokens == 3 * 50 + 12 * 7, "the last token of a choice is predicted, not read"
    monkeypatch.setattr(planning, "MIN_SHARED_TOKENS", 51)
    before, whole = _counted(lm, requests, monkeypatch)
    assert whole == 12 * (50 + 7)
    assert [a for a, _ in answers] == pytest.approx([b for b, _ in before], abs=1e-4)
    single = [_request(context, [5 + i]) for context in contexts for i in range(4)]
    monkeypatch.setattr(planning, "MIN_SHARED_TOKENS", 8)
    assert _counted(lm, single, monkeypatch)[1] == 3 * 50, "a choice of one token costs no pass of its own"


def test_requests_cut_on_the_left_have_the_answers_of_each_alone(parts):
    model, tokenizer = parts
    rng, room = random.Random(5), model.config.seq_len
    context = _ids(rng, room + 20)
    requests = [_request(context, _ids(rng, size)) for size in (3, 3, 9, 9, 1)]
    lm = TinylabLM(model, tokenizer)
    for (_, _, choice), (value, greedy) in zip(requests, lm._loglikelihood_tokens(requests), strict=True):
        kept = (context + choice)[-(room + 1) : -len(choice)]
        assert (value, greedy) == (pytest.approx(_alone(model, kept, choice)[0], abs=1e-4), greedy)
    assert lm.truncated


def test_a_context_without_ids_is_replaced_by_the_prefix(parts):
    """lm-eval hands the spaces of a context to the choice, so a context of spaces alone has no ids left."""
    model, tokenizer = parts
    lm = TinylabLM(model, tokenizer)
    (answer,) = lm._loglikelihood_tokens([_request([], [7, 8])])
    assert answer[0] == pytest.approx(_alone(model, [lm.prefix_id], [7, 8])[0], abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 1000])
def test_every_row_is_in_one_batch_of_bounded_size_and_one_context_length(max_tokens):
    rng, rows = random.Random(6), set()
    for _ in range(30):
        context = tuple(_ids(rng, rng.choice((1, 8, 20, 20, 33))))
        for _ in range(rng.choice((1, 4))):
            count = rng.randrange(1, 12)
            rows.add(((*context, *_ids(rng, count)), count))
    planned = list(batches(rows, max_tokens))
    assert sorted(row for batch in planned for row in batch.rows) == sorted(rows)
    assert planned == list(batches(sorted(rows), max_tokens)), "the order given does not matter"
    for batch in planned:
        longest = max(len(ids) for ids, _ in batch.rows) - 1
        assert len(batch.rows) == 1 or len(batch.rows) * longest <= max_tokens
        if batch.shared:
            assert {len(ids) - count for ids, count in batch.rows} == {batch.shared}
    if max_tokens == 1000:
        assert sum(len(batch.rows) for batch in planned if batch.shared) > 50
