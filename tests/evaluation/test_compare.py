"""Comparisons against counts made by hand; what must not be compared is refused with the fields that differ."""

from __future__ import annotations

import json

import pytest

from tinylab.errors import ConfigError, EvaluationError, NothingFoundError
from tinylab.evaluation.compare import compare
from tinylab.evaluation.evaluate import evaluate
from tinylab.evaluation.paired import compare_records
from tinylab.evaluation.records import Key, ResultStore, items_hash
from tinylab.evaluation.scores import Scores, margin, predictions
from tinylab.evaluation.statistics import mcnemar

PROFILE = {"name": "p", "add_bos": False, "dtype": "fp32"}


def _item(number: int, right: bool, strength: float = 1.0) -> dict:
    """An item of two choices; the first is right and is chosen or not."""
    scores = [-10.0, -10.0 - strength] if right else [-10.0 - strength, -10.0]
    return {"doc_id": number, "doc_hash": f"h{number}", "gold": 0, "loglikelihoods": scores, "unconditional": None} | {
        "characters": [4, 4], "bytes": [4, 4], "truncated": False, "greedy": [False, False],
    }  # fmt: skip


def _record(store, weights, task, answers, *, profile=PROFILE, source="file:x", first=0, version="1"):
    items = [_item(first + i, bool(a), 1.0 + i) for i, a in enumerate(answers)]
    key = Key(weights, "t", json.dumps(profile), task, version, items_hash(i["doc_hash"] for i in items))
    header = {
        "label": weights,
        "step": 1,
        "tokens": 10,
        "stage": "s",
        "metric": "acc",
        "metrics": ["acc"],
        "chance": 0.5,
    }
    return store.put(key, header | {"profile": profile, "source": source}, items)


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path)


def test_table_flips_and_mean_equal_counts_by_hand(store):
    a = [_record(store, "a", "x", [1, 1, 0, 0, 0, 1]), _record(store, "a", "y", [1, 0])]
    b = [_record(store, "b", "x", [1, 0, 1, 1, 1, 1]), _record(store, "b", "y", [1, 0])]
    comparison = compare_records(a, b)
    x, y = comparison.rows()
    assert (x["both_right"], x["only_a"], x["only_b"], x["both_wrong"], x["n"]) == (2, 1, 3, 0, 6)
    assert x["difference"] == pytest.approx(2 / 6) and x["p"] == mcnemar(1, 3)
    assert x["p_holm"] == min(1.0, 2 * x["p"]) and y["p_holm"] == 1.0
    assert comparison.mean.difference == pytest.approx(1 / 6)
    assert [(r["task"], round(r["share"], 4), r["without"]) for r in comparison.moved()] == [
        ("x", 0.1667, 0.0),
        ("y", 0.0, pytest.approx(1 / 3)),
    ]
    flips = comparison.flips("x")
    assert {(r["doc_hash"], r["direction"]) for r in flips} == {
        ("h1", "right → wrong"), ("h2", "wrong → right"), ("h3", "wrong → right"), ("h4", "wrong → right"),
    }  # fmt: skip
    assert flips[0]["doc_hash"] == "h4" and (flips[0]["margin_a"], flips[0]["margin_b"]) == (-5.0, 5.0)
    assert list(comparison.margins()["change"])[:6] == [0.0, -4.0, 6.0, 8.0, 10.0, 0.0]


def test_swapping_the_models_turns_the_sign_and_keeps_the_p_value(store):
    a, b = _record(store, "a", "x", [1, 0, 0, 1, 0]), _record(store, "b", "x", [0, 1, 1, 1, 0])
    (one,), (other,) = compare_records([a], [b]).rows(), compare_records([b], [a]).rows()
    assert one["difference"] == -other["difference"] and one["p"] == other["p"]
    assert (one["low"], one["high"]) == (-other["high"], -other["low"])


def test_other_profiles_and_other_items_are_refused_field_by_field(store):
    a = _record(store, "a", "x", [1, 0])
    b = _record(store, "b", "x", [1, 0], profile=PROFILE | {"add_bos": True, "name": "q"})
    with pytest.raises(EvaluationError, match=r"profile.add_bos is False and True") as refused:
        compare_records([a], [b])
    assert "dtype" not in str(refused.value) and "name" not in str(refused.value)
    b = _record(store, "c", "x", [1, 0, 1], first=1, source="file:y")
    with pytest.raises(EvaluationError, match="items are 2 of file:x and 3 of file:y, 1 in common"):
        compare_records([a], [b])
    with pytest.raises(EvaluationError, match="task version is 1 and 2"):
        compare_records([a], [_record(store, "e", "x", [1, 0], version="2")])
    with pytest.raises(EvaluationError, match="no task in common"):
        compare_records([a], [_record(store, "d", "z", [1])])


def test_accuracies_and_margins_follow_from_the_kept_numbers():
    item = {"gold": 1, "loglikelihoods": [-4.0, -6.0, -9.0], "characters": [2, 4, 20], "bytes": [40, 4, 40]}
    item["unconditional"] = [-5.0, -9.0, -9.5]
    assert predictions(item) == {"acc": 0, "acc_norm": 2, "acc_bytes": 0, "acc_mutual_info": 1}
    assert margin(item) == -2.0 and margin(item, "acc_mutual_info") == 2.0
    assert margin(item, "acc_norm") == pytest.approx(-1.5 + 0.45)
    assert margin(item, "acc_bytes") == pytest.approx(-1.5 + 0.1)
    tie = {"gold": 1, "loglikelihoods": [-3.0, -3.0], "characters": [1, 1], "bytes": [1, 1]}
    assert predictions(tie)["acc"] == 0, "argmax takes the first, as in lm-eval"


def test_the_share_of_yes_ties_and_cut_prompts_are_counted(store):
    _record(store, "a", "boolq", [1, 0, 0, 0])  # gold is 0, "no"
    (row,) = Scores(store).rows()
    assert (row["yes_share"], row["k"], row["n"], row["ties"], row["truncated"]) == (0.75, 1, 4, 0, 0)


def test_a_damaged_record_is_named_with_its_line(store):
    record = _record(store, "a", "x", [1, 0])
    record.path.write_text(record.path.read_text() + '{"torn": ')
    with pytest.raises(EvaluationError, match=r"x-v1-.*jsonl, line 4 is not a line of a result store"):
        record.items()
    for text, place in ((b"\xff\xfe\x00", "line 1 is not"), (b'{"key": {"task": "x"}}\n', "line 1 is not")):
        record.path.write_bytes(text)
        with pytest.raises(EvaluationError, match=place):
            Scores(store).rows()
    record.path.write_text(json.dumps(record.header) + "\n")
    with pytest.raises(EvaluationError, match="must hold a record and its items"):
        Scores(store).rows()


def test_a_metric_that_no_task_has_is_refused_with_those_that_are_there(store):
    _record(store, "a", "x", [1, 0])
    with pytest.raises(ConfigError, match="metric must be one of acc; found 'f1'"):
        Scores(store).rows("f1")


def test_the_same_weights_are_recognised_under_two_names(lab, tmp_path):
    comparison = compare(lab.checkpoints[0], str(lab.checkpoints[0]), store=tmp_path, progress=False)
    assert comparison.same_weights and "A and B are the same weights" in comparison.text()
    assert all(row["difference"] == 0 and row["p"] == 1 for row in comparison.rows())


def test_missing_results_are_scored_first_unless_told_not_to(lab, tmp_path):
    a, b = lab.checkpoints
    with pytest.raises(NothingFoundError, match="must hold results of small@4; found none"):
        compare(a, b, store=tmp_path, evaluate_missing=False, progress=False)
    comparison = compare(a, b, store=tmp_path, progress=False)
    assert [row["task"] for row in comparison.rows()] == ["continuation", "code"]
    document = json.loads(json.dumps(comparison.document()))
    assert document["a"]["label"] == "small@4" and document["family_size"] == 2 and not document["same_weights"]
    assert all({"prompt", "choices", "origin"} <= set(flip) for flip in document["flips"])
    again = compare(a, b, store=tmp_path, evaluate_missing=False, progress=False)
    assert again.rows() == comparison.rows()


def test_results_under_another_profile_do_not_pair(lab, tmp_path):
    evaluate(lab.checkpoints[0], tasks="docstring", store=tmp_path, progress=False)
    evaluate(lab.checkpoints[1], tasks="docstring", store=tmp_path, profile="current", progress=False)
    with pytest.raises(EvaluationError, match=r"docstring: profile.add_bos is False and None"):
        compare(*lab.checkpoints, store=tmp_path, progress=False)


def test_a_limit_and_a_profile_are_kept_though_the_store_holds_more(lab, tmp_path):
    evaluate(lab.checkpoints, tasks="continuation", store=tmp_path, limit=8, progress=False)
    assert [r["n"] for r in compare(*lab.checkpoints, store=tmp_path, progress=False).rows()] == [8]
    assert [r["n"] for r in compare(*lab.checkpoints, store=tmp_path, limit=5, progress=False).rows()] == [5]
    (pair,) = compare(
        *lab.checkpoints, store=tmp_path, tasks="continuation", limit=5, profile="current", progress=False
    ).pairs
    assert pair.a.header["profile"]["name"] == pair.b.header["profile"]["name"] == "current"
    held = {"store": tmp_path, "evaluate_missing": False, "progress": False}
    (pair,) = compare(*lab.checkpoints, profile="current", **held).pairs
    assert pair.a.header["profile"]["name"] == "current" and pair.result.n == 5
    with pytest.raises(NothingFoundError, match="must hold results of small@4; found none"):
        compare(*lab.checkpoints, limit=6, **held)
