"""Scores over training: one panel per task, so that no scale is shared by tasks that differ."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylab.plots.style import (
    COLORS,
    DASHES,
    FAINT,
    INK,
    MARKERS,
    LabFigure,
    Table,
    empty,
    new_figure,
    style_axes,
    token_axis,
)

SHORT = {
    "commonsense_avg7": "mean of the seven",
    "hellaswag": "HellaSwag",
    "openbookqa": "OpenBookQA",
    "winogrande": "WinoGrande",
    "arc_challenge": "ARC challenge",
    "arc_easy": "ARC easy",
    "boolq": "BoolQ",
    "piqa": "PIQA",
}
COLUMNS = 4


def score_trajectories(scores: Table | None, published: Table | None = None, reference: str = "tinyllama") -> LabFigure:
    """Accuracy over training tokens with 95% intervals and chance lines, one panel per task.

    `scores` is `Scores(store).table()`, a run's own tasks, on top; `published` is `published()`, below, on its own
    panels and its own token axis. `reference` is `tinyllama`, `pythia` or `both`: whose published points are drawn.
    """
    table: Any = scores
    own = [] if scores is None or not len(scores) else list(dict.fromkeys(scores["task"]))
    shown = _published_rows(published, reference)
    tasks = [t for t in SHORT if len(shown) and (shown["task"] == t).any()]
    columns = COLUMNS if tasks else max(1, min(COLUMNS, len(own)))
    own_rows, published_rows = -(-len(own) // columns), -(-len(tasks) // columns)
    rows = max(1, own_rows + published_rows)
    figure, axes = new_figure(
        "Scores over training",
        rows=rows,
        columns=columns,
        width={1: 5.2, 2: 7.6}.get(columns, 10.0),
        height=(0.9 if tasks or not own else 1.3) + 2.35 * rows,
        caption="Bars: 95% interval over the draw of items (Wilson; normal for the mean). Dotted: chance. "
        "Panels have scales of their own.",
    )
    for i, task in enumerate(own):
        ax = axes[i // columns, i % columns]
        _panel(ax, table[table["task"] == task], f"this run: {task}", "this run", 0)
    for i, task in enumerate(tasks):
        ax = axes[own_rows + i // columns, i % columns]
        rows_of_task = shown[shown["task"] == task]
        for j, (family, group) in enumerate(rows_of_task.groupby("family", sort=False)):
            _panel(ax, group, SHORT[task], str(family), 1 + list(FAMILIES.values()).index(str(family)), label=j)
    used = {(i // columns, i % columns) for i in range(len(own))}
    used |= {(own_rows + i // columns, i % columns) for i in range(len(tasks))}
    for place in np.ndindex(axes.shape):
        panel: Any = axes[place]
        panel.set_visible(place in used or not used)
    if not used:
        empty(axes[0, 0], "no scores yet")
    _share_legend(figure, axes, own_rows, bool(tasks))
    return figure


FAMILIES = {"v1.0": "TinyLlama v1.0", "v1.1": "TinyLlama v1.1", "pythia": "Pythia-1.0B"}


def _published_rows(published: Table | None, reference: str) -> Any:
    """The published rows of the wanted family, with the column `family`."""
    if published is None or not len(published):
        return ()
    table = published[published["low"].notna()].copy()
    table["family"] = [_family(label) for label in table["label"]]
    if reference == "tinyllama":
        return table[table["family"].notna()]  # Pythia is TinyLlama's own yardstick and stays
    if reference == "pythia":
        return table[table["family"] == FAMILIES["pythia"]]
    return table[table["family"].notna()]


def _family(label: str) -> str | None:
    if label.startswith("Pythia"):
        return FAMILIES["pythia"]
    if label == "v1.1":
        return FAMILIES["v1.1"]
    return None if label.startswith("v1.1") else FAMILIES["v1.0"]


def _panel(ax: Any, rows: Table, title: str, name: str, color: int, label: int = 0) -> None:
    """One series with its intervals in one panel, in percent."""
    rows = rows.sort_values("tokens")
    x, y = rows["tokens"].to_numpy(float), 100 * rows["value"].to_numpy(float)
    low, high = 100 * rows["low"].to_numpy(float), 100 * rows["high"].to_numpy(float)
    ax.errorbar(
        x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], color=COLORS[color], elinewidth=1.2,
        capsize=2, marker=MARKERS[color], markersize=4.5, linewidth=1.4, linestyle=DASHES[color], label=name,
    )  # fmt: skip
    chance = rows["chance"].dropna()
    if len(chance) and label == 0:
        ax.axhline(100 * float(chance.iloc[0]), color=FAINT, linewidth=1.1, linestyle=":")
    if label == 0:
        style_axes(ax)
        metric = rows["metric"].iloc[0] if "metric" in rows else "accuracy"
        ax.set_title(title.replace("_", " "), fontsize=9.5, color=INK, loc="left")
        ax.set_ylabel(
            f"{'acc. by mutual info' if metric == 'acc_mutual_info' else metric.replace('_', ' ')} (%)", fontsize=8.5
        )
    ax.margins(x=0.08)
    token_axis(ax)
    ax.xaxis.get_major_locator().set_params(nbins=4)
    ax.xaxis.label.set_size(8.5)


def _share_legend(figure: LabFigure, axes: Any, own_rows: int, has_published: bool) -> None:
    """Names of the published series once, in the last free panel or in the first panel."""
    if not has_published:
        return
    panel = axes[own_rows, 0]
    handles, labels = panel.get_legend_handles_labels()
    free = [ax for ax in axes[own_rows:].flat if not ax.get_visible()]
    if free:
        ax = free[0]
        ax.set_visible(True)
        ax.axis("off")
        ax.legend(handles, labels, loc="center left", frameon=False, fontsize=9, title="published", alignment="left")
    else:
        figure.legend(handles, labels, loc="upper right", frameon=False, fontsize=8.5, ncols=3)
