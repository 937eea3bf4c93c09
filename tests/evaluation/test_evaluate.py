"""Our scores against lm-eval's own backend on the same checkpoint, item by item; what is kept; what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylab.catalog.reference import load_model, load_tokenizer
from tinylab.errors import ConfigError, DataError, EvaluationError, NothingFoundError
from tinylab.evaluation import evaluate as entry
from tinylab.evaluation.compare import compare
from tinylab.evaluation.evaluate import evaluate
from tinylab.evaluation.lm_eval_model import TinylabLM
from tinylab.evaluation.probes import build_probe
from tinylab.evaluation.published import BENCHMARKS
from tinylab.evaluation.score_model import run_task
from tinylab.evaluation.scores import Scores, score_item
from tinylab.evaluation.tasks import benchmark, probe
from tinylab.runs.folder import Run


def _hflm(folder: Path, prefix_id: int | None = None):
    """lm-eval's Hugging Face backend on an exported checkpoint: the oracle."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        add_bos_token=False,
        batch_size=4,
        device="cpu",
        prefix_token_id=prefix_id,
    )


def _assert_same_answers(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[k] for k in ("doc_hash", "prompt_hash", "target_hash", "gold", "greedy")] == [
            other[k] for k in ("doc_hash", "prompt_hash", "target_hash", "gold", "greedy")
        ]
        # fp32 sums over at most a few hundred tokens, in another order: 1e-3 nats is what the design asks for
        np.testing.assert_allclose(mine["loglikelihoods"], other["loglikelihoods"], atol=1e-3)
        assert np.argmax(mine["loglikelihoods"]) == np.argmax(other["loglikelihoods"])
        if other["unconditional"] is not None:
            np.testing.assert_allclose(mine["unconditional"], other["unconditional"], atol=1e-3)


@pytest.mark.parametrize("name", ["continuation", "code"])
def test_likelihoods_and_choices_equal_lm_evals_own_backend_on_probes(lab, name):
    folder = lab.checkpoints[0]
    tokenizer = load_tokenizer(folder)
    lm = TinylabLM(load_model(folder), tokenizer, max_tokens=700)
    items = build_probe(lab.shards, name)[:8]
    ours, _ = run_task(lm, probe(name, items, "test"))
    theirs, _ = run_task(_hflm(folder, tokenizer.eos_id), probe(name, items, "test"))
    _assert_same_answers(ours, theirs)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_likelihoods_and_choices_equal_lm_evals_own_backend_on_benchmarks(lab, shared, name):
    """BoolQ's passages exceed 256 tokens: both cut them on the left, and ours counts it."""
    folder = lab.checkpoints[0]
    lm = TinylabLM(load_model(folder), load_tokenizer(folder))
    ours, texts = run_task(lm, benchmark(name, shared / "evals"), limit=6)
    theirs, _ = run_task(_hflm(folder), benchmark(name, shared / "evals"), limit=6)
    _assert_same_answers(ours, theirs)
    assert len(texts) == 6 and all(len(t["choices"]) >= 2 for t in texts)
    assert name != "boolq" or any(item["truncated"] for item in ours)


def test_metrics_from_kept_items_equal_lm_evals(lab, shared):
    """acc, acc_norm and acc_mutual_info computed on reading are the numbers that lm-eval prints."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    lm = TinylabLM(load_model(lab.checkpoints[0]), load_tokenizer(lab.checkpoints[0]))
    for task, metrics in (
        (probe("docstring", build_probe(lab.shards, "docstring")[:24], "test"), ("acc", "acc_norm", "acc_mutual_info")),
        (benchmark("arc_easy", shared / "evals"), ("acc", "acc_norm")),
        (benchmark("winogrande", shared / "evals"), ("acc",)),
    ):
        items, _ = run_task(lm, task, limit=24)
        loaded = {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}
        results = lm_evaluate(lm, loaded, limit=24, bootstrap_iters=0)["results"][task.name]
        for metric in metrics:
            assert np.mean([score_item(i, metric) for i in items]) == pytest.approx(results[f"{metric},none"]), metric


def test_greedy_flag_and_likelihood_follow_from_the_logits(lab):
    lm = TinylabLM(load_model(lab.checkpoints[1]), load_tokenizer(lab.checkpoints[1]), max_tokens=64)
    rng = random.Random(1)
    requests = []
    for length in (1, 5, 30, 30, 90):
        ids = [rng.randrange(3, 400) for _ in range(length + 4)]
        requests.append((("c", "d"), ids[:length], ids[length:]))
    best = lm.model(torch.tensor([requests[2][1]]))[0, -1].argmax().item()
    requests.append((("c", "e"), requests[2][1], [best]))
    answers = lm._loglikelihood_tokens(requests)
    for (_, context, choice), (value, greedy) in zip(requests, answers, strict=True):
        with torch.no_grad():
            logs = lm.model(torch.tensor([context + choice[:-1]]))[0, len(context) - 1 :].log_softmax(-1)
        assert value == pytest.approx(logs[range(len(choice)), choice].sum().item(), abs=1e-4)
        assert greedy == (logs.argmax(-1).tolist() == choice)
    assert answers[-1][1] is True


def test_bos_is_added_only_when_the_profile_says_so(lab):
    tokenizer, model = load_tokenizer(lab.checkpoints[0]), load_model(lab.checkpoints[0])
    plain, with_bos = TinylabLM(model, tokenizer), TinylabLM(model, tokenizer, add_bos=True)
    assert with_bos.tok_encode("walk") == [tokenizer.bos_id, *plain.tok_encode("walk")]
    assert with_bos.tok_encode("walk", add_special_tokens=False) == tokenizer.encode("walk")
    assert plain.prefix_token_id == tokenizer.eos_id


def test_rolling_likelihood_predicts_every_token_once(lab):
    from lm_eval.api.instance import Instance

    lm = TinylabLM(load_model(lab.checkpoints[0]), load_tokenizer(lab.checkpoints[0]))
    text = "walks tall mind rocker leafing unwalked " * 20
    ids = lm.text.encode(text)
    assert len(ids) < 256
    with torch.no_grad():
        logs = lm.model(torch.tensor([[lm.prefix_id, *ids[:-1]]]))[0].log_softmax(-1)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    assert lm.loglikelihood_rolling([request])[0] == pytest.approx(logs[range(len(ids)), ids].sum().item(), abs=1e-2)
    longer = Instance("loglikelihood_rolling", {}, (text * 3,), 0)
    assert lm.loglikelihood_rolling([longer])[0] < lm.loglikelihood_rolling([request])[0]


def test_generation_stops_before_the_first_stop_string(lab):
    from lm_eval.api.instance import Instance

    lm = TinylabLM(load_model(lab.checkpoints[0]), load_tokenizer(lab.checkpoints[0]))
    request = lambda until: Instance("generate_until", {}, ("Walks tall", {"until": until, "max_gen_toks": 12}), 0)  # noqa: E731
    (whole,) = lm.generate_until([request([])])
    stop = whole[len(whole) // 2]
    assert lm.generate_until([request([stop])]) == [whole[: whole.index(stop)]]


def test_evaluate_keeps_every_item_and_repeats_nothing(lab, capsys, tmp_path):
    store = tmp_path / "store"
    first = evaluate(lab.checkpoints, store=store)
    assert [r.header["label"] for r in first] == ["small@4", "small@4", "small@9", "small@9"]
    stamps = {r.path: r.path.stat().st_mtime_ns for r in first}
    capsys.readouterr()
    again = evaluate(lab.run.path, store=store, all_checkpoints=True)
    assert {r.path: r.path.stat().st_mtime_ns for r in again} == stamps
    assert capsys.readouterr().err.count("in the store already") == 4
    rows = Scores(store).rows()
    assert [(r["step"], r["tokens"], r["stage"]) for r in rows[::2]] == [(4, 2048, "basic"), (9, 5120, "cooldown")]
    for row in rows:
        assert row["metric"] == "acc_mutual_info" and row["low"] <= row["value"] <= row["high"]
        assert row["chance"] == 0.25 and 0.25 < row["baseline"] <= 1
    documents = first[0].documents()
    assert {i["doc_hash"] for i in first[0].items()} == set(documents)
    assert all({"prompt", "choices", "origin"} <= set(d) for d in documents.values())


def test_limit_makes_another_measurement_of_the_first_items(lab, tmp_path):
    (whole,) = evaluate(lab.checkpoints[0], tasks="continuation", store=tmp_path, progress=False)
    (part,) = evaluate(lab.checkpoints[0], tasks="continuation", store=tmp_path, limit=5, progress=False)
    assert part.path != whole.path and len(part.items()) == 5
    for a, b in zip(part.items(), whole.items(), strict=False):
        assert a["doc_hash"] == b["doc_hash"]
        assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], abs=1e-4)  # other batches, other sum order


def test_a_killed_evaluation_keeps_its_finished_tasks(lab, tmp_path, monkeypatch):
    from tinylab.evaluation import score_model

    run_task = score_model.run_task

    def killed(lm, task, limit=None):
        if task.name == "code":
            raise KeyboardInterrupt
        return run_task(lm, task, limit)

    monkeypatch.setattr(score_model, "run_task", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lab.checkpoints[0], store=tmp_path, progress=False)
    assert [r.key.task for r in Scores(tmp_path).records()] == ["continuation"]


def test_a_checkpoint_that_retention_removes_meanwhile_is_left_out(lab, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(lab.run.path, tmp_path / "runs" / "small")
    references = entry._references

    def removing(ref, all_checkpoints):
        found = references(ref, all_checkpoints)
        shutil.rmtree(found[0].path)
        return found

    monkeypatch.setattr(entry, "_references", removing)
    (record,) = evaluate(run, tasks="code", limit=2, all_checkpoints=True)
    assert record.header["label"] == "small@9" and "left out: small@4 was removed" in capsys.readouterr().err


def test_evaluation_leaves_every_random_state_alone(lab, tmp_path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    evaluate(lab.checkpoints[0], tasks="docstring", store=tmp_path, progress=False)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_another_tokenizer_than_that_of_training_is_refused(lab, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(lab.checkpoints[0], folder)
    record = json.loads((folder / "trainer" / "trainer.json").read_text())
    (folder / "trainer" / "trainer.json").write_text(json.dumps(record | {"tokenizer_hash": "0" * 64}))
    (folder / "manifest.json").unlink()
    with pytest.raises(EvaluationError, match=r"must be scored with the tokenizer of its training \(000000000000…\)"):
        evaluate(folder, store=tmp_path / "store", data=lab.data, progress=False)


def test_what_is_missing_is_named(lab, tmp_path, shared):
    with pytest.raises(ConfigError, match="found 'continuatoin'; did you mean continuation"):
        evaluate(lab.checkpoints[0], tasks="continuatoin")
    with pytest.raises(ConfigError, match="limit must be at least 1 item; found 0"):
        evaluate(lab.checkpoints[0], limit=0)
    with pytest.raises(ConfigError, match="profile must be one of tinyllama-2023, current; found 'tinyllama'"):
        evaluate(lab.checkpoints[0], profile="tinyllama")
    with pytest.raises(ConfigError, match="each REF must be a run; found small@4: leave out @"):
        evaluate("small@4", all_checkpoints=True)
    folder = tmp_path / "copy"
    shutil.copytree(lab.checkpoints[0], folder)
    with pytest.raises(EvaluationError, match="copy is not a checkpoint of a run. Name the prepared data"):
        evaluate(folder)
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(EvaluationError, match=r"the documents of piqa .file:piqa.jsonl. must have the fields"):
        evaluate(folder, tasks="piqa", data_dir=tmp_path)
    with pytest.raises(EvaluationError, match=r"cannot read .*boolq.jsonl"):
        evaluate(folder, tasks="boolq", data_dir=tmp_path)
    with pytest.raises(NothingFoundError, match=r"must hold results; found none. Fill it: tinylab evaluate"):
        Scores(tmp_path / "nowhere").table()


def test_probes_of_other_data_than_a_run_was_trained_on_are_refused(lab, tmp_path):
    """What those hold out, the run may have trained on."""
    shutil.copytree(lab.run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.write_journal("resumed", data_fingerprint="0" * 64)
    with pytest.raises(DataError, match=r"must hold the data that .* was trained on, fingerprint 0000"):
        evaluate(run.path, tasks="continuation", store=tmp_path / "store")
    with pytest.raises(DataError, match=r"must hold the data that .* was trained on"):
        compare(run.path, lab.checkpoints[0], tasks="continuation", store=tmp_path / "store")
