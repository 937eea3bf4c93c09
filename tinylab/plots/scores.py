"""Scores over training: one panel per task, so that no scale is shared by tasks that differ."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tinylab.errors import ConfigError
from tinylab.plots.style import COLORS, DASHES, FAINT, INK, MARKERS, LabFigure, Table, empty, new_figure, token_axis

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
"""Published tasks in the order of their panels, as they are written there."""
FAMILIES = {"v1.0": "TinyLlama v1.0", "v1.1": "TinyLlama v1.1", "pythia": "Pythia-1.0B"}
REFERENCES = {"tinyllama": tuple(FAMILIES.values()), "pythia": (FAMILIES["pythia"],)}
COLUMNS = 4


def score_trajectories(scores: Table | None, published: Table | None = None, reference: str = "tinyllama") -> LabFigure:
    """Accuracy over training tokens with 95% intervals and chance lines, one panel per task.

    `scores` is `Scores(store).table()`, a run's own tasks, on top, a line for each number of items and profile;
    `published` is `published()`, below, on its own panels and its own token axis. `reference` says whose points those
    are: `tinyllama` (and Pythia-1.0B, its yardstick) or `pythia`. Raises ConfigError for another one.
    """
    if reference not in REFERENCES:
        raise ConfigError(f"reference must be one of {', '.join(REFERENCES)}; found {reference!r}")
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
        caption="Bars: 95% interval over the draw of items (Wilson; normal for the mean). Dotted: chance; "
        "dash-dotted: a rule without a model (most words shared, or always the most frequent answer). "
        "Each panel has its own scale.",
    )
    if not own and not tasks:
        return empty(figure, "no scores yet")
    panels, published_panels = list(axes[:own_rows].flat), list(axes[own_rows:].flat)
    for ax, task in zip(panels, own, strict=False):
        _own_panel(ax, table[table["task"] == task], task)
    for ax, task in zip(published_panels, tasks, strict=False):
        for j, (family, group) in enumerate(shown[shown["task"] == task].groupby("family", sort=False)):
            _panel(ax, group, SHORT[task], str(family), 1 + list(FAMILIES.values()).index(str(family)), first=j == 0)
    free = published_panels[len(tasks) :]
    for ax in (*panels[len(own) :], *free):
        ax.set_visible(False)
    if tasks:
        _legend(figure, published_panels[0], free)
    return figure


def _published_rows(published: Table | None, reference: str) -> Any:
    if published is None or not len(published):
        return ()
    table = published[published["low"].notna()].copy()
    keys = ["pythia" if n.startswith("Pythia") else n if n.startswith("v1.1") else "v1.0" for n in table["label"]]
    table["family"] = [FAMILIES.get(key) for key in keys]
    return table[table["family"].isin(REFERENCES[reference])]


def _own_panel(ax: Any, rows: Table, task: str) -> None:
    """A run's scores on one task: what was measured on other items or otherwise is another line, not another point."""
    keys = [key for key in ("n", "profile") if key in rows]
    series: list[Any] = sorted(rows.groupby(keys), key=lambda part: (-len(part[1]), -part[0][0]))
    for j, (_, group) in enumerate(series):
        name = f"{int(group['n'].iloc[0])} items"
        if "profile" in rows and rows["profile"].nunique() > 1:
            name += f", {group['profile'].iloc[0]}"
        _panel(ax, group, f"this run: {task}", name, j % 4, first=j == 0)
    at = rows["tokens"].dropna()
    if len(at) and 0 < 50 * at.min() < at.max():  # early checkpoints are at powers of two
        ax.set_xscale("log")
        token_axis(ax, "training tokens (log scale)")
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=7.5, loc="upper left")


def _panel(ax: Any, rows: Table, title: str, name: str, look: int, *, first: bool) -> None:
    """One series with its intervals in one panel, in percent; the first brings title, units and chance lines."""
    rows = rows.sort_values("tokens")
    x, y = rows["tokens"].to_numpy(float), 100 * rows["value"].to_numpy(float)
    low, high = 100 * rows["low"].to_numpy(float), 100 * rows["high"].to_numpy(float)
    ax.errorbar(
        x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], color=COLORS[look], elinewidth=1.2,
        capsize=2, marker=MARKERS[look], markersize=4.5, linewidth=1.4, linestyle=DASHES[look], label=name,
    )  # fmt: skip
    if not first:
        return
    for column, dash in (("chance", ":"), ("baseline", "-.")):
        for level in rows[column].dropna()[:1] if column in rows else ():
            ax.axhline(100 * float(level), color=FAINT, linewidth=1.1, linestyle=dash)
    ax.set_title(title.replace("_", " "), fontsize=9.5, color=INK, loc="left")
    metric = rows["metric"].iloc[0].replace("acc_mutual_info", "acc. by mutual info").replace("_", " ")
    ax.set_ylabel(f"{metric} (%)", fontsize=8.5)
    ax.margins(x=0.08)
    token_axis(ax)
    ax.xaxis.get_major_locator().set_params(nbins=4)
    ax.xaxis.label.set_size(8.5)


def _legend(figure: LabFigure, panel: Axes, free: list[Axes]) -> None:
    """Names of the published series, once: in the first free panel, or above all panels."""
    handles, labels = panel.get_legend_handles_labels()
    if free:
        free[0].set_visible(True)
        free[0].axis("off")
        look: dict[str, Any] = {"loc": "center left", "frameon": False, "fontsize": 9, "alignment": "left"}
        free[0].legend(handles, labels, title="published", **look)
    else:
        figure.legend(handles, labels, loc="upper right", frameon=False, fontsize=8.5, ncols=3)
