"""Two models side by side: the numbers of the functions beneath, and a note for what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tinylab.analysis.pair import analyze_pair, compare_scores, load, scored_pair
from tinylab.analysis.token_losses import compare_tokens
from tinylab.runs.folder import Run

TEXT = "Return a new list <b>containing</b> all items from the iterable, in $ascending$ order: über 你好."


def test_the_tables_hold_the_numbers_of_the_functions_beneath(lab: Path):
    a, b = scored_pair(Run("tiny")) or ("", "")
    first, second = load(a), load(b)
    found = analyze_pair(first, second, text=TEXT, prompts=["The"], max_new_tokens=5)
    table = compare_tokens(first.model, second.model, first.tokenizer, TEXT)
    assert found.tokens.equals(table) and found.summary()["loss_b"] == pytest.approx(table["loss_b"].mean())
    assert set(found.scores["task"]) and found.scores["n"].iloc[0] == 20
    assert len(found.flips) == int((found.scores["only_a"] + found.scores["only_b"]).sum())
    kept = {(f["task"], f["prompt"][-160:]): f for f in compare_scores(a, b).flips()}
    for row in found.flips.to_dict("records"):
        flip = kept[row["task"], row["prompt"]]
        wrong = flip["chosen_b"] if row["direction"] == "right → wrong" else flip["chosen_a"]
        assert row["right answer"] == flip["choices"][flip["gold"]][:160]
        assert row["chosen instead"] == flip["choices"][wrong][:160] and wrong != flip["gold"]
    assert json.loads(json.dumps(found.summary()))["scores"][0]["n"] == 20


def test_identity_names_both_models_and_their_weights(lab: Path):
    step = int(Run("tiny").checkpoints()[0].name.removeprefix("step-"))  # one that has no scores
    found = analyze_pair(f"tiny@{step}", "tiny", text=TEXT)
    rows = found.identity.set_index("").T.to_dict("records")
    assert [row["model"] for row in rows] == [found.a, found.b] == [f"tiny@{step}", "tiny@24"]
    assert [row["step"] for row in rows] == [str(step), "24"] and rows[0]["tokenizer"] == rows[1]["tokenizer"]
    assert rows[0]["weights (SHA-256)"] == "not scored" and found.notes[-1].startswith("scores: ")
    assert found.scores.empty and found.flips.empty and found.generations.empty


def test_an_empty_prompt_stays_empty_and_only_an_empty_answer_is_named(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tinylab.model.generate.generate", lambda *_, **__: "")
    (row,) = analyze_pair("tiny", "tiny", text=TEXT, prompts=[""]).generations.to_numpy().tolist()
    assert row == ["", *["(nothing: the document ends here)"] * 2]


def test_the_same_weights_are_called_the_same(lab: Path):
    last = str(Run("tiny").checkpoints()[-1])
    found = analyze_pair(last, "tiny", text=TEXT)
    assert "same weights" in found.notes[0] and found.tokens["delta"].abs().max() == 0


def test_two_tokenizers_leave_the_loss_by_token_empty_with_a_note(lab: Path):
    first = load("tiny")
    other = replace(first, tokenizer=cast(Any, SimpleNamespace(hash="0" * 64)))
    found = analyze_pair(first, other, text=TEXT)
    assert found.tokens.empty and "different tokenizers" in " ".join(found.notes) and found.summary()["loss_a"] is None


def test_a_run_with_fewer_than_two_scored_checkpoints_has_no_pair(lab: Path):
    for path in (Run("tiny").evaluations_path / "results").glob("*/*.jsonl"):
        path.unlink()
    assert scored_pair(Run("tiny")) is None
