"""Figures of a model's cost and of a series of checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tinylab import plots


def texts(figure: plots.LabFigure) -> list[str]:
    """Every text in the axes, and the labels of ticks."""
    found = [t.get_text() for ax in figure.axes for t in ax.texts]
    return found + [t.get_text() for ax in figure.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]


def test_shares_add_up_and_totals_stand_behind_their_bars():
    figure = plots.shares({"a": {"x": 750_000, "y": 250_000, "total": 1}, "b": {"x": 1, "y": 3}}, "T")
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [75.0, 25.0, 25.0, 75.0]
    assert {"1M parameters", "4 parameters", "75", "25"} <= set(texts(figure))
    assert "51.6 GB" in texts(plots.shares({"a": {"x": 51_600_000_000}}, "T", "bytes"))


def test_every_entry_of_the_legend_is_inside_the_figure():
    parts = dict.fromkeys(("weights", "gradients", "moments", "compute copies", "activations", "logits"), 10)
    figure = plots.shares({"tinyllama_120m": parts}, "T", "bytes")
    figure.png()
    box = figure.axes[0].get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1


def test_the_series_figure_shows_every_distance_and_marks_the_suspects():
    distance = np.array([[0, 1, 2], [1, 0, 1.5], [2, 1.5, 0]])
    problem = SimpleNamespace(labels=("r@2",))
    audit = SimpleNamespace(compared=("r@1", "r@2", "r@3"), distance=distance, problems=[problem])
    figure = plots.series_audit(audit)
    square, line = figure.axes[:2]
    assert np.array_equal(square.images[0].get_array(), distance)
    assert list(line.lines[0].get_ydata()) == [1, 1.5]
    colors = {t.get_text(): t.get_color() for t in square.get_yticklabels()}
    assert colors["r@2"] == "#D55E00" != colors["r@1"]


def test_a_series_of_one_says_that_there_is_nothing_to_compare():
    audit = SimpleNamespace(compared=("r@1",), distance=np.zeros((1, 1)), problems=[])
    assert "fewer than two comparable checkpoints" in texts(plots.series_audit(audit))
