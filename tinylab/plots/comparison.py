"""Two checkpoints: score differences with intervals, items that flipped, loss by token and by position."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tinylab.plots.style import COLORS, FAINT, INK, LabFigure, Table, empty, label_ends, new_plot, write_behind

_NO_TASK = "no task was scored for both checkpoints"
_NO_TOKEN = "the text has no tokens to predict"


def score_differences(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Dot plot of the paired difference B − A per task, in points, with its 95% interval; 0 is in the middle.

    `table` has one row per task: `task, difference, low, high` (fractions), `p_holm` and `n` (items). Filled dots are
    significant after Holm over the whole table; hollow ones are not.
    """
    figure, ax = new_plot(
        f"Score of {b} minus score of {a}",
        height=1.5 + 0.42 * max(len(table), 2),
        caption=f"Same items for both. Bars: 95% interval of the paired difference. p: exact McNemar test, Holm's "
        f"correction over {len(table)} tests; filled: below 0.05.",
    )
    if not len(table):
        return empty(figure, _NO_TASK)
    span = 1.0
    for y, (_, row) in enumerate(table[::-1].iterrows()):
        d, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        color, p = COLORS[0] if d >= 0 else COLORS[1], row["p_holm"]
        filling = color if p < 0.05 else "white"
        ax.plot([low, high], [y, y], color=color, linewidth=2)
        ax.plot(d, y, "o", color=color, markersize=8, markerfacecolor=filling, markeredgewidth=1.8)
        words = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        write_behind(ax, y, f"{d:+.1f} points, {words}, n = {int(row['n'])}", INK)
        span = max(span, abs(low), abs(high))
    ax.set(xlim=(-span * 1.08, span * 1.08), ylim=(-0.6, len(table) - 0.4))
    ax.set_xlabel(f"difference (percentage points); right of 0: {b} is better", parse_math=False)
    return _tasks(figure, ax, table)


def flips(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Items that changed side between A and B, per task: right → wrong to the left, wrong → right to the right.

    `table` has one row per task: `task, both_right, only_a, only_b, both_wrong` (items).
    """
    figure, ax = new_plot(
        f"Items that flipped from {a} to {b}",
        height=1.5 + 0.46 * max(len(table), 2),
        caption="Counts of items. Their difference is the change of the score; their sum shows how much that hides.",
    )
    if not len(table):
        return empty(figure, _NO_TASK)
    span = max(1, int(table[["only_a", "only_b"]].to_numpy().max()))
    for y, (_, row) in enumerate(table[::-1].iterrows()):
        lost, won = int(row["only_a"]), int(row["only_b"])
        ax.barh(y, -lost, color=COLORS[1], height=0.62)
        ax.barh(y, won, color=COLORS[0], height=0.62, hatch="//", edgecolor="white", linewidth=0)
        ax.text(-lost - 0.02 * span, y, f"{lost}", ha="right", va="center", fontsize=9, color=COLORS[1])
        ax.text(won + 0.02 * span, y, f"{won}", ha="left", va="center", fontsize=9, color=COLORS[0])
        write_behind(ax, y, f"{int(row['both_right'])} right in both, {int(row['both_wrong'])} wrong in both")
    ax.set_xlim(-span * 1.22, span * 1.22)
    ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set(ylim=(-0.7, len(table) - 0.3), xlabel="items:  ← right before, wrong now        wrong before, right now →")
    return _tasks(figure, ax, table)


def _tasks(figure: LabFigure, ax: Axes, table: Table) -> LabFigure:
    """The figure with the names of the tasks on its y axis, the first on top, and a line at 0."""
    ax.axvline(0, color=FAINT, linewidth=1)
    ax.set_yticks(range(len(table)), [str(task).replace("_", " ") for task in table["task"][::-1]])
    ax.grid(axis="y", visible=False)
    return figure


def token_delta(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Loss of B minus loss of A at every token of a text, centred at 0; the six largest changes are named.

    `table` has one row per predicted token: `position` (from 1), `text`, `loss_a`, `loss_b`, `delta` (nats).
    """
    figure, ax = new_plot(
        "Where the loss changed along the text",
        width=8.6,
        height=3.6,
        caption=f"One bar per token: nats of {b} minus nats of {a}. Below 0 (blue, hatched): {b} predicts better. "
        f"Mean {table['delta'].mean():+.3f} nats over {len(table)} tokens."
        if len(table)
        else "",
    )
    if not len(table):
        return empty(figure, _NO_TOKEN)
    x, delta = table["position"].to_numpy(int), table["delta"].to_numpy(float)
    better, worse = delta < 0, delta >= 0
    ax.bar(x[worse], delta[worse], width=0.85, color=COLORS[1])
    ax.bar(x[better], delta[better], width=0.85, color=COLORS[0], hatch="///", edgecolor="white", linewidth=0)
    ax.axhline(0, color=FAINT, linewidth=1)
    span = max(float(np.abs(delta).max()), 0.1) * 1.3
    ax.set_ylim(-span, span)
    texts, taken = table["text"].tolist(), []
    for i in np.argsort(-np.abs(delta)):
        if len(taken) == 6 or abs(delta[i]) == 0:
            break
        if all(abs(x[i] - other) > 0.055 * len(x) for other in taken):
            taken.append(x[i])
            ax.annotate(visible_token(texts[i]), (x[i], delta[i]), xytext=(0, 3 if delta[i] > 0 else -3), ha="center",
                        textcoords="offset points", va="bottom" if delta[i] > 0 else "top", fontsize=8, color=INK,
                        parse_math=False)  # fmt: skip
    ax.set(xlim=(x[0] - 1, x[-1] + 1), xlabel="position in the text (tokens)", ylabel="loss B − loss A (nats)")
    return figure


def position_loss(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Mean loss of A and B in stretches of the text, by position, with ± 1.96 standard errors over the tokens."""
    figure, ax = new_plot(
        "Loss by position",
        height=3.4,
        caption="Mean over stretches of equal length. Bands: 1.96 standard errors over the tokens of a stretch.",
    )
    if not len(table):
        return empty(figure, _NO_TOKEN)
    parts = np.array_split(np.arange(len(table)), int(np.clip(len(table) // 12, 1, 24)))
    x, ends = [table["position"].to_numpy(float)[p].mean() for p in parts], []
    for name, column, color, look in ((a, "loss_a", COLORS[1], "s--"), (b, "loss_b", COLORS[0], "o-")):
        values = table[column].to_numpy(float)
        mean = np.array([values[p].mean() for p in parts])
        error = np.array([1.96 * values[p].std(ddof=1) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in parts])
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        ax.plot(x, mean, look, color=color, markersize=4.5, linewidth=1.6)
        ends.append((mean[-1], f"{name}, mean {values.mean():.2f}", color))
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.set(xlabel="position in the text (tokens)", ylabel="loss (nats per token)")
    label_ends(ax, ends)
    return figure


def visible_token(text: Any) -> str:
    """A token's text for a figure: spaces and newlines shown, unprintable characters as their code, at most 12 long."""
    shown = str(text).replace(" ", "·").replace("\n", "⏎").replace("\t", "→")
    shown = "".join(c if c.isprintable() and ord(c) < 0x2E80 else f"<{ord(c):X}>" for c in shown)
    return shown if len(shown) <= 12 else shown[:11] + "…"
