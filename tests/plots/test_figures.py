"""Figures from records: they show the numbers they were given, name units, and never touch pyplot."""

from __future__ import annotations

import base64
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas
import pytest

from tinylab import plots
from tinylab.config.presets import demo
from tinylab.errors import ConfigError
from tinylab.evaluation.published import published
from tinylab.plots.corpus import mixture_points
from tinylab.plots.style import COLORS
from tinylab.plots.training import moving_mean

HOSTILE = "<script>alert(1)</script> $x$ `y` \x1b[31mred\x1b[0m \u202egnp\u202c \x00 </table> \" ' & \\(z\\)"


def metrics(steps: int = 40, offset: float = 0.0) -> pandas.DataFrame:
    rows = []
    for step in range(1, steps + 1):
        measured = step % 10 == 0
        rows.append(
            {"step": step, "tokens": 1000 * step, "loss": 9 - step / 10 + offset, "lr": 1e-3, "grad_norm": 1 + step % 3}
            | {"stage": "a", "step_time_s": 0.5, "data_wait_s": 0.05, "tokens_per_s": 2000.0, "peak_memory_gib": 0.5}
            | {"validation_loss": 9.5 - step / 10 if measured else None, "bits_per_byte": 3.0 if measured else None}
        )
    return pandas.DataFrame(rows)


def scores() -> pandas.DataFrame:
    rows = [{"label": f"r@{s}", "step": s, "tokens": 1000 * s, "value": 0.2 + s / 100} for s in (1, 20, 40)]
    common = {"task": "probe", "metric": "acc", "chance": 0.25, "n": 100}
    return pandas.DataFrame([r | common | {"low": r["value"] - 0.1, "high": r["value"] + 0.1} for r in rows])


def pairs(n: int = 2) -> pandas.DataFrame:
    row = {"difference": 0.1, "low": 0.05, "high": 0.15, "p_holm": 0.01, "n": 100}
    counts = {"both_right": 40, "only_a": 5, "only_b": 15, "both_wrong": 40}
    return pandas.DataFrame([{"task": f"task_{i}"} | row | counts for i in range(n)])


def tokens(texts: list[str] | None = None) -> pandas.DataFrame:
    texts = texts or [" the", "\n", "cat", HOSTILE] * 8
    a = np.linspace(1, 5, len(texts))
    b = a + np.where(np.arange(len(texts)) % 2, 0.5, -1.0)
    positions = range(1, len(texts) + 1)
    return pandas.DataFrame({"position": positions, "text": texts, "loss_a": a, "loss_b": b, "delta": b - a})


def layouts() -> list[dict]:
    refused = {"strategy": "fsdp", "ranks": 3, "threads": None, "micro_batch": 2, "tokens_per_s": None, "refused": "no"}
    one = {"strategy": "none", "ranks": 1, "threads": 2, "micro_batch": 8, "tokens_per_s": 1000.0}
    one |= {"low": 900.0, "high": 1200.0, "ratio": 1.0, "refused": None}
    return [one, one | {"strategy": "ddp", "ranks": 2, "threads": 1, "tokens_per_s": 1100.0, "ratio": 1.1}, refused]


EMPTY = pandas.DataFrame()
FIGURES = {
    "loss": lambda: plots.loss_curves([("r", metrics())]),
    "loss of five": lambda: plots.loss_curves([(f"r{i}", metrics(offset=i)) for i in range(5)]),
    "loss by hours": lambda: plots.loss_curves([("r", metrics())], x="hours"),
    "loss of nothing": lambda: plots.loss_curves([("r", EMPTY)]),
    "bits": lambda: plots.validation_bits([("r", metrics())]),
    "bits before any": lambda: plots.validation_bits([("r", metrics(5))]),
    "rate": lambda: plots.learning_rate(demo()),
    "gradient": lambda: plots.gradient_norm([("r", metrics())]),
    "speed": lambda: plots.throughput([("r", metrics())]),
    "speed of one step": lambda: plots.throughput([("r", metrics(1))]),
    "mixture": lambda: plots.mixture_of(demo()),
    "lengths": lambda: plots.document_lengths({"prose": [3, 50, 700], "code": [100], "none": []}),
    "frequencies": lambda: plots.token_frequencies({"prose": [0, 5, 1, 100], "code": [1, 1, 0, 1]}),
    "scores": lambda: plots.score_trajectories(scores(), published()),
    "scores of a run": lambda: plots.score_trajectories(scores()),
    "scores, Pythia": lambda: plots.score_trajectories(None, published(), "pythia"),
    "no scores": lambda: plots.score_trajectories(None),
    "differences": lambda: plots.score_differences(pairs()),
    "no differences": lambda: plots.score_differences(EMPTY),
    "flips": lambda: plots.flips(pairs()),
    "tokens": lambda: plots.token_delta(tokens()),
    "no tokens": lambda: plots.token_delta(tokens().head(0)),
    "layouts": lambda: plots.scaling(layouts()),
    "no layout": lambda: plots.scaling(layouts()[2:]),
    "position": lambda: plots.position_loss(tokens()),
    "position of one": lambda: plots.position_loss(tokens(["x"])),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_shows_itself_as_png_with_units_on_its_axes(name: str):
    figure = FIGURES[name]()
    data, metadata = figure._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert metadata["image/png"]["width"] > 300
    for ax in figure.axes:
        if ax.get_visible() and ax.axison and ax.has_data():
            assert ax.get_xlabel()
            assert ax.get_ylabel() or ax.get_yticklabels()


def test_drawing_never_imports_pyplot():
    code = (
        "import sys; from tinylab import plots; from tinylab.config.presets import demo;"
        "plots.mixture_of(demo()).png(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_loss_figure_holds_every_step_its_mean_and_the_measured_points():
    table = metrics()
    lines = plots.loss_curves([("r", table)], smooth=3000).axes[0].lines
    raw, smoothed, _, points = lines[:4]
    assert list(raw.get_ydata()) == list(table["loss"]) and list(raw.get_xdata()) == list(table["tokens"])
    assert smoothed.get_ydata()[10] == pytest.approx(table["loss"][8:11].mean())
    assert list(points.get_xdata()) == [10_000, 20_000, 30_000, 40_000]
    assert (raw.get_color(), raw.get_alpha()) == (COLORS[0], 0.22)


def test_the_moving_mean_counts_the_last_tokens_only_and_skips_missing_values():
    at, values = np.array([10.0, 20, 30, 40]), np.array([1.0, np.nan, 3.0, 5.0])
    assert moving_mean(at, values, 20).tolist() == [1.0, 1.0, 3.0, 4.0]
    assert moving_mean(at, values, 0).tolist()[0] == 1.0


def test_stage_marks_stand_where_stages_end():
    config = demo()
    lines = [line.get_xdata()[0] for line in plots.learning_rate(config).axes[0].lines if len(line.get_xdata()) == 2]
    assert config.tokens_at(config.stage_bounds()[0][1]) in lines


def test_the_layouts_that_ran_have_bars_quartiles_and_their_ratio_to_the_first():
    figure = plots.scaling(layouts())
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [1000, 1100]
    names = ["1 rank × 2 threads, micro-batch 8", "ddp, 2 ranks × 1 thread, micro-batch 8"]
    assert [label.get_text() for label in ax.get_yticklabels()] == names
    assert [text.get_text() for text in ax.texts] == ["1K tokens/s, 1.00 ×", "1.1K tokens/s, 1.10 ×"]
    assert ax.collections[1].get_segments()[0][:, 0].tolist() == [900, 1200]
    assert any("Refused: 1 of 3" in text.get_text().replace("\n", " ") for text in figure.texts)


def test_the_mixture_ramps_linearly_from_stage_to_stage():
    config = demo()
    x, shares = mixture_points(config)
    end = config.tokens_at(config.stage_bounds()[0][1])
    ramp = config.stages[1].ramp_tokens
    middle = np.interp(end + ramp / 2, x, shares["prose"])
    assert (np.interp(end - 1, x, shares["prose"]), middle) == pytest.approx((0.7, 0.6))
    assert np.allclose(np.sum(list(shares.values()), axis=0), 1)
    abrupt = replace(config, stages=(config.stages[0], replace(config.stages[1], ramp_tokens=0)))
    x, shares = mixture_points(abrupt)
    assert {s for at, s in zip(x, shares["prose"], strict=True) if at == end} == {0.7, 0.5}


def test_own_and_published_scores_never_share_a_panel():
    figure = plots.score_trajectories(scores(), published())
    for ax in figure.axes:
        largest = [max(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) and max(line.get_xdata()) > 1]
        assert not largest or max(largest) < 1e6 or min(largest) > 1e10


def test_intervals_are_drawn_as_given():
    figure = plots.score_trajectories(scores())
    ends = figure.axes[0].collections[0].get_segments()
    assert [tuple(round(float(y), 6) for _, y in segment) for segment in ends] == [(11, 31), (30, 50), (50, 70)]


def test_measurements_on_other_items_are_a_line_of_their_own():
    few = scores().assign(n=10, value=0.9)
    ax = plots.score_trajectories(pandas.concat([scores(), few])).axes[0]
    drawn = {c.get_label(): np.round(c.lines[0].get_ydata(), 6).tolist() for c in ax.containers}
    assert drawn == {"100 items": [21, 40, 60], "10 items": [90, 90, 90]} and ax.get_legend() is not None


def test_checkpoints_at_powers_of_two_stand_apart_on_a_log_axis_that_says_so():
    early = scores().assign(tokens=[1000, 30_000, 2_000_000])
    wide, near = (plots.score_trajectories(table).axes[0] for table in (early, scores()))
    assert (wide.get_xscale(), wide.get_xlabel()) == ("log", "training tokens (log scale)")
    assert (near.get_xscale(), near.get_xlabel()) == ("linear", "training tokens")


def test_the_majority_answer_of_boolq_is_drawn():
    panels = {ax.get_title(loc="left"): ax for ax in plots.score_trajectories(None, published()).axes}
    levels = {round(float(line.get_ydata()[0]), 2) for line in panels["BoolQ"].lines if line.get_linestyle() == "-."}
    assert levels == {62.17}


def test_what_a_rule_without_a_model_gets_is_drawn_beside_chance():
    ax = plots.score_trajectories(scores().assign(baseline=0.65)).axes[0]
    levels = {line.get_linestyle(): float(line.get_ydata()[0]) for line in ax.lines if len(line.get_xdata()) == 2}
    assert levels == {":": 25.0, "-.": 65.0}


def test_overlaid_runs_differ_without_colour():
    runs = [(f"r{i}", metrics(offset=i)) for i in range(5)]
    for figure, bold in ((plots.loss_curves(runs), 2.0), (plots.gradient_norm(runs), 1.8)):
        lines = [line for line in figure.axes[0].lines if line.get_linewidth() == bold]
        looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines]
        assert len(set(looks)) == 5 and len({dash for _, dash in looks[:4]}) == 4


def test_dollars_in_names_are_no_formula():
    """A name such as a$_$b is a broken formula to matplotlib."""
    name = r"a$_$b \x$\frac"
    for figure in (
        plots.loss_curves([(name, metrics()), ("r", metrics())]),
        plots.gradient_norm([(name, metrics())]),
        plots.throughput([(name, metrics())]),
        plots.score_differences(pairs(), name, name),
        plots.flips(pairs(), name, name),
        plots.position_loss(tokens(), name, name),
        plots.token_delta(tokens(), name, name),
    ):
        assert figure.png(30).startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused_by_name():
    with pytest.raises(ConfigError, match="x must be one of tokens, step, hours; found 'days'"):
        plots.loss_curves([("r", metrics())], x="days")
    with pytest.raises(ConfigError, match="reference must be one of tinyllama, pythia; found 'both'"):
        plots.score_trajectories(None, published(), "both")


def test_a_label_at_the_end_of_a_curve_says_when_it_is_a_mean():
    table = tokens()
    labels = [text.get_text() for text in plots.position_loss(table, "old", "new").axes[0].texts]
    assert f"old, mean {table['loss_a'].mean():.2f}" in labels


def test_flips_count_to_both_sides():
    bars = plots.flips(pairs(1)).axes[0].patches
    assert [bar.get_width() for bar in bars] == [-5, 15]
