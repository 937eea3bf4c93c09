"""The comparison form: the numbers of its function, choices by step, errors in the view, a twin without frontend."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tinylab.analysis.pair import compare_scores, load, scored_pair
from tinylab.analysis.token_losses import compare_tokens
from tinylab.runs.folder import Run
from tinylab.widgets import compare_view

TEXT = "Return a new list <b>containing</b> all items from the iterable, in $ascending$ order: über 你好."


@pytest.fixture
def form(lab: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tinylab.widgets import CompareCheckpoints

        steps = [int(p.name[5:]) for p in Run("tiny").checkpoints()]
        yield CompareCheckpoints(f"tiny@{steps[2]}", "tiny", text=TEXT, prompts=["import os\n\ndef", "The"])


def test_the_view_holds_the_numbers_of_the_functions_beneath(lab: Path):
    a, b = scored_pair(Run("tiny"))
    view = compare_view(a, b, text=TEXT, prompts=["The"], max_new_tokens=5)
    table = compare_tokens(load(a).model, load(b).model, load(a).tokenizer, TEXT)
    assert view.summary()["loss_b"] == pytest.approx(table["loss_b"].mean())
    assert set(view.scores["task"]) and view.scores["n"].iloc[0] == 20
    assert len(view.flips) == int((view.scores["only_a"] + view.scores["only_b"]).sum())
    kept = {(f["task"], f["prompt"][-160:]): f for f in compare_scores(a, b).flips()}
    for row in view.flips.to_dict("records"):
        flip = kept[row["task"], row["prompt"]]
        wrong = flip["chosen_b"] if row["direction"] == "right → wrong" else flip["chosen_a"]
        assert row["right answer"] == flip["choices"][flip["gold"]][:160]
        assert row["chosen instead"] == flip["choices"][wrong][:160] and wrong != flip["gold"]
    assert view.html.count("data:image/png;base64,") == 4 and "<b>containing" not in view.html


def test_an_empty_prompt_stays_empty_and_only_an_empty_answer_is_named(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tinylab.model.generate.generate", lambda *_, **__: "")
    (row,) = compare_view("tiny", "tiny", text=TEXT, prompts=[""]).generations.to_numpy().tolist()
    assert row == ["", *["(nothing: the document ends here)"] * 2]


def test_the_same_weights_are_called_the_same(lab: Path):
    last = str(Run("tiny").checkpoints()[-1])
    view = compare_view(last, "tiny", text=TEXT)
    assert "same weights" in view.notes[0] and view.tokens["delta"].abs().max() == 0


def test_the_form_offers_every_checkpoint_and_shows_what_the_function_gives(form):
    assert len(form.a.options) == len(Run("tiny").checkpoints())
    form.button.click()
    assert form.state.value.startswith(("loading", "comparing", "done"))
    form.wait(120)
    assert form.state.value == "done: tiny@24 against tiny@4"
    a, b, settings = form._question()
    assert settings["prompts"] == ["import os\n\ndef", "The"]
    assert form.result.value == compare_view(a, b, **settings).html == form.static().html


def test_the_bundle_carries_the_live_view_and_the_fallback(form, monkeypatch: pytest.MonkeyPatch):
    bundle = form._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == form.form.model_id
    assert bundle["text/html"] == form.static().html and "<img" in bundle["text/html"]
    monkeypatch.setenv("TINYLAB_EXECUTOR", "papermill")
    assert set(form._repr_mimebundle_()) == {"text/html", "text/plain"}


def test_an_error_is_shown_in_the_view_and_the_next_question_works(form):
    form.text.value = ""
    form.b.options = [*form.b.options, ("gone", "no<where>")]
    form.b.value = "no<where>"
    form.button.click()
    form.wait(120)
    assert form.state.value == "failed: see below" and not form.button.disabled
    assert "The comparison failed" in form.result.value and "<where>" not in form.result.value
    form.b.value = "tiny"
    form.button.click()
    form.wait(120)
    assert form.state.value.startswith("done") and "2 to 8192 tokens" in form.result.value


def test_prompts_pass_through_the_form_unchanged(lab: Path):
    from tinylab.widgets import CompareCheckpoints

    prompts = [r"print('a\n')", "import os\n\ndef", r"\d+\\", "one\x0bline\u2028"]
    form = CompareCheckpoints("tiny", "tiny", prompts=prompts)
    assert len(form.prompts.value.split("\n")) == 4 and form._question()[2]["prompts"] == prompts


def test_controls_are_labelled_and_sliders_wait_for_release(form):
    controls = [form.a, form.b, form.text, form.prompts, form.length, form.temperature, form.seed]
    assert all(control.description for control in controls)
    assert "tokens" in form.length.description
    assert not form.length.continuous_update and not form.text.continuous_update
