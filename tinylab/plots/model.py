"""Figures of a model's cost, and of a series of checkpoints as its audit sees it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinylab.config.counts import format_bytes, format_count
from tinylab.plots.style import AREAS, COLORS, LabFigure, empty, new_figure, new_plot, write_behind


def shares(parts: Mapping[str, Mapping[str, int]], title: str, unit: str = "parameters") -> LabFigure:
    """One stacked bar per model: the parts of its total, as shares, with the total behind the bar.

    `parts` holds, for each name, its parts in `unit` (counts or bytes; a key `total` is left out of the bar).
    """
    figure, ax = new_plot(title, height=1.5 + 0.55 * max(len(parts), 1), caption=f"Shares of all {unit}.")
    names = list(dict.fromkeys(k for row in parts.values() for k in row if k != "total"))
    if not names:
        return empty(figure, "no parts")
    left = np.zeros(len(parts))
    totals = np.array([sum(v for k, v in row.items() if k != "total") for row in parts.values()], dtype=float)
    for i, name in enumerate(names):
        width = 100 * np.array([row.get(name, 0) for row in parts.values()], dtype=float) / totals
        bars = ax.barh(list(parts), width, left=left, color=AREAS[i % 8], label=name, edgecolor="white", height=0.62)
        texts = [f"{w:.0f}" if w >= 5 else "" for w in width]
        ax.bar_label(bars, texts, label_type="center", fontsize=8, color="white" if i % 8 in (0, 2, 5) else "black")
        left += width
    for row, total in enumerate(totals):
        text = format_bytes(total) if unit == "bytes" else f"{format_count(total)} {unit}"
        write_behind(ax, row, text, fontsize=9)
    ax.set(xlim=(0, 100), ylim=(len(parts) - 0.5, -0.5), xlabel="share (%)")
    ax.grid(False, axis="y")
    ax.legend(ncols=len(names), loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, fontsize=8.5,
              handlelength=1.2, columnspacing=1.0, handletextpad=0.5)  # fmt: skip
    return figure


def series_audit(audit: Any) -> LabFigure:
    """Distances between all checkpoints of a series, and the change from each to the next; suspects are marked.

    `audit` is a SeriesAudit (analysis/series_audit.py). In an honest series the distance grows away from the diagonal:
    a duplicate is a zero off it, a swapped or foreign checkpoint a row that does not fit its neighbours.
    """
    labels, distance = list(audit.compared), np.asarray(audit.distance, dtype=float)
    figure, axes = new_figure(
        "Is this series what it claims to be?",
        columns=2,
        width=9.6,
        height=4.4,
        caption="Relative distance of weights: |a − b| / sqrt(|a| |b|) over a fixed sample of every tensor. "
        "Orange: checkpoints that the audit names.",
        gridspec_kw={"width_ratios": [1.15, 1]},
    )
    square, line = axes[0]
    if len(labels) < 2:
        return empty(figure, "fewer than two comparable checkpoints")
    suspects = {label for problem in audit.problems for label in problem.labels}
    image = square.imshow(distance, cmap="Blues", vmin=0)
    figure.colorbar(image, ax=square, shrink=0.8, label="relative distance")
    square.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
    square.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
    square.grid(False)
    for tick in (*square.get_xticklabels(), *square.get_yticklabels()):
        if tick.get_text() in suspects:
            tick.set(color=COLORS[1], fontweight="bold")
    change = np.diagonal(distance, 1)
    line.plot(range(1, len(labels)), change, color=COLORS[0], marker="o", markersize=4)
    for i, label in enumerate(labels[1:], start=1):
        if label in suspects:
            line.plot(i, change[i - 1], color=COLORS[1], marker="s", markersize=8, linestyle="none")
    line.set_xticks(range(1, len(labels)), labels[1:], rotation=90, fontsize=7, parse_math=False)
    line.set(ylim=(0, None), ylabel="distance from the checkpoint before", xlabel="checkpoint, in the order of steps")
    return figure
