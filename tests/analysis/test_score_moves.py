"""Moves between milestones and spikes of the loss, against numbers counted by hand and printed by others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import stats

from tinylab.analysis.loss_spikes import loss_spikes
from tinylab.analysis.score_moves import mean_contributions, own_moves, published_moves
from tinylab.evaluation.evaluate import evaluate
from tinylab.evaluation.published import published
from tinylab.evaluation.scores import Scores
from tinylab.runs.folder import Run


def test_published_moves_find_boolq_fall_and_hellaswag_rise_only_where_they_are():
    table = published_moves(published())
    assert len(table) == 42  # seven tasks, six neighbouring pairs of v1.0
    boolq = table[(table["task"] == "boolq") & (table["to"] == "1431k")].iloc[0]
    assert boolq["change"] == pytest.approx((1891 - 2067) / 3270) and boolq["significant"]
    assert boolq["p"] == pytest.approx(8.2e-6, rel=0.02)  # z = -4.46
    last = table[(table["to"] == "1431k") & (table["task"] != "boolq")]
    assert not last["significant"].any()


def test_contributions_add_up_to_the_change_of_the_mean():
    table = mean_contributions(published(), "1195k", "1431k")
    tasks, mean = table.iloc[:-1], table.iloc[-1]
    assert tasks["of the mean"].sum() == pytest.approx(mean["change"]) == pytest.approx(-0.8911, abs=1e-3)
    assert tasks.iloc[0]["task"] == "boolq"


def test_own_moves_equal_the_difference_of_the_scores(lab: Path):
    table = own_moves("tiny")
    scores = Scores("tiny").table().sort_values("tokens")
    for row in table.to_dict("records"):
        values = scores[scores["task"] == row["task"]].set_index("label")["value"]
        assert row["change"] == pytest.approx(values[row["to"]] - values[row["from"]])
        assert (row["wrong to right"] - row["right to wrong"]) / 20 == pytest.approx(row["change"])
        assert row["p_holm"] >= row["p"]


def test_a_checkpoint_scored_on_something_else_leaves_its_neighbours_to_compare(lab: Path):
    steps = [int(path.name[5:]) for path in Run("tiny").checkpoints()]
    before = own_moves("tiny").drop(columns="p_holm")
    evaluate(f"tiny@{steps[3]}", tasks="continuation", limit=5, progress=False)
    evaluate(f"tiny@{steps[-1]}", tasks="continuation", limit=3, progress=False)
    pandas.testing.assert_frame_equal(own_moves("tiny").drop(columns="p_holm"), before)


def test_an_unusual_step_is_found_and_the_fast_fall_at_the_start_is_not(tmp_path: Path):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    losses = [9 - 0.1 * i for i in range(30)] + [6.0] * 40
    losses[50] = 7.5
    records = [{"step": i + 1, "tokens": 10 * i, "loss": loss, "stage": "a"} for i, loss in enumerate(losses)]
    run.metrics_path.write_text("".join(json.dumps(r) + "\n" for r in records))
    table = loss_spikes(run, count=2)
    assert table["step"].iloc[0] == 51 and table["excess"].iloc[0] == pytest.approx(1.5)
    assert len(table) == 2 and not len(loss_spikes(run, window=100))


def test_deviations_of_a_jump_equal_scipys_normal_scaled_ones(tmp_path: Path):
    run = Run(tmp_path / "r")
    run.path.mkdir()
    losses = np.random.default_rng(0).normal(5, 0.1, 40)
    losses[30] = 7
    records = [{"step": i + 1, "tokens": i, "loss": loss, "stage": "a"} for i, loss in enumerate(losses)]
    run.metrics_path.write_text("".join(json.dumps(r) + "\n" for r in records))
    before, first = losses[5:30], loss_spikes(run).iloc[0]
    expected = (7 - np.median(before)) / stats.median_abs_deviation(before, scale="normal")
    assert first["step"] == 31 and first["deviations"] == pytest.approx(expected, rel=1e-4)
