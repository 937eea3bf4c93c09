"""Two checkpoints: score differences with intervals, items that flipped, loss by token and by position."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinylab.plots.style import COLORS, FAINT, INK, LabFigure, Table, empty, label_ends, new_figure


def score_differences(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Dot plot of the paired difference B − A per task, in points, with its 95% interval; 0 is in the middle.

    `table` has one row per task: `task, difference, low, high` (fractions), `p_holm` and `n` (items). Filled dots are
    significant after Holm over the whole table; hollow ones are not.
    """
    rows = table.reset_index(drop=True)
    figure, axes = new_figure(
        f"Score of {b} minus score of {a}",
        width=7.6,
        height=1.5 + 0.42 * max(len(rows), 2),
        caption=f"Same items for both. Bars: 95% interval of the paired difference. p: exact McNemar, by Holm over "
        f"{len(rows)} tests; filled: below 0.05.",
    )
    ax = axes[0, 0]
    if not len(rows):
        empty(ax, "no task was scored for both checkpoints")
        return figure
    span = 1.0
    for i, row in rows.iterrows():
        y, d = len(rows) - 1 - int(i), 100 * row["difference"]
        low, high = 100 * row["low"], 100 * row["high"]
        color = COLORS[0] if d >= 0 else COLORS[1]
        sure = row["p_holm"] < 0.05
        ax.plot([low, high], [y, y], color=color, linewidth=2)
        ax.plot(d, y, "o", color=color, markersize=8, markerfacecolor=color if sure else "white", markeredgewidth=1.8)
        text = f"{d:+.1f} points, p {_p(row['p_holm'])}, n = {int(row['n'])}"
        ax.annotate(text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=8.5, color=INK, annotation_clip=False)  # fmt: skip
        span = max(span, abs(low), abs(high))
    ax.axvline(0, color=FAINT, linewidth=1)
    ax.set_xlim(-span * 1.08, span * 1.08)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_yticks(range(len(rows)), [str(t).replace("_", " ") for t in rows["task"][::-1]])
    ax.set_xlabel(f"difference (percentage points); right of 0: {b} is better", parse_math=False)
    ax.grid(axis="y", visible=False)
    return figure


def flips(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Items that changed side between A and B, per task: right → wrong to the left, wrong → right to the right.

    `table` has one row per task: `task, both_right, only_a, only_b, both_wrong` (items).
    """
    rows = table.reset_index(drop=True)
    figure, axes = new_figure(
        f"Items that flipped from {a} to {b}",
        width=7.6,
        height=1.5 + 0.46 * max(len(rows), 2),
        caption="Counts of items. Their difference is the change of the score; their sum is how much that hides.",
    )
    ax = axes[0, 0]
    if not len(rows):
        empty(ax, "no task was scored for both checkpoints")
        return figure
    y = np.arange(len(rows))[::-1]
    lost, won = rows["only_a"].to_numpy(int), rows["only_b"].to_numpy(int)
    ax.barh(y, -lost, color=COLORS[1], height=0.62)
    ax.barh(y, won, color=COLORS[0], height=0.62, hatch="//", edgecolor="white", linewidth=0)
    ax.axvline(0, color=FAINT, linewidth=1)
    span = max(1, int(max(lost.max(), won.max())))
    for i, at in enumerate(y):
        ax.text(-lost[i] - 0.02 * span, at, f"{lost[i]}", ha="right", va="center", fontsize=9, color=COLORS[1])
        ax.text(won[i] + 0.02 * span, at, f"{won[i]}", ha="left", va="center", fontsize=9, color=COLORS[0])
        kept = f"{int(rows['both_right'][i])} right in both, {int(rows['both_wrong'][i])} wrong in both"
        ax.annotate(kept, (1.0, at), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=8.5, color=FAINT, annotation_clip=False)  # fmt: skip
    ax.set_xlim(-span * 1.22, span * 1.22)
    ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set_yticks(y, [str(t).replace("_", " ") for t in rows["task"]])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel("items:  ← right before, wrong now        wrong before, right now →")
    ax.grid(axis="y", visible=False)
    return figure


def token_delta(table: Table, a: str = "A", b: str = "B", labels: int = 6) -> LabFigure:
    """Loss of B minus loss of A at every token of a text, centred at 0; the largest changes are named.

    `table` has one row per predicted token: `position` (from 1), `text`, `loss_a`, `loss_b`, `delta` (nats).
    """
    figure, axes = new_figure(
        "Where the loss changed along the text",
        width=8.6,
        height=3.6,
        caption=f"One bar per token: nats of {b} minus nats of {a}. Below 0 (blue, hatched): {b} predicts better. "
        f"Mean {table['delta'].mean():+.3f} nats over {len(table)} tokens."
        if len(table)
        else "",
    )
    ax = axes[0, 0]
    if not len(table):
        empty(ax, "the text has no token to predict")
        return figure
    x, delta = table["position"].to_numpy(int), table["delta"].to_numpy(float)
    better, worse = delta < 0, delta >= 0
    ax.bar(x[worse], delta[worse], width=0.85, color=COLORS[1])
    ax.bar(x[better], delta[better], width=0.85, color=COLORS[0], hatch="///", edgecolor="white", linewidth=0)
    ax.axhline(0, color=FAINT, linewidth=1)
    span = max(float(np.abs(delta).max()), 0.1) * 1.3
    ax.set_ylim(-span, span)
    texts, taken = table["text"].tolist(), []
    for i in np.argsort(-np.abs(delta)):
        if len(taken) == labels or abs(delta[i]) == 0:
            break
        if all(abs(x[i] - other) > 0.055 * len(x) for other in taken):
            taken.append(x[i])
            ax.annotate(visible_token(texts[i]), (x[i], delta[i]), xytext=(0, 3 if delta[i] > 0 else -3), ha="center",
                        textcoords="offset points", va="bottom" if delta[i] > 0 else "top", fontsize=8, color=INK,
                        parse_math=False)  # fmt: skip
    ax.set_xlim(x[0] - 1, x[-1] + 1)
    ax.set_xlabel("position in the text (tokens)")
    ax.set_ylabel("loss B − loss A (nats)")
    return figure


def position_loss(table: Table, a: str = "A", b: str = "B") -> LabFigure:
    """Mean loss of A and B in stretches of the text, by position, with ± 1.96 standard errors over the tokens."""
    figure, axes = new_figure(
        "Loss by position",
        height=3.4,
        caption="Mean over stretches of equal length. Bands: 1.96 standard errors over the tokens of a stretch.",
    )
    ax, ends = axes[0, 0], []
    count = int(np.clip(len(table) // 12, 1, 24))
    parts = [p for p in np.array_split(np.arange(len(table)), count) if len(p)]
    if not len(table):
        empty(ax, "the text has no token to predict")
        return figure
    for name, column, color, marker in ((a, "loss_a", COLORS[1], "s"), (b, "loss_b", COLORS[0], "o")):
        values = table[column].to_numpy(float)
        x = np.array([table["position"].to_numpy(float)[p].mean() for p in parts])
        mean = np.array([values[p].mean() for p in parts])
        error = np.array([1.96 * values[p].std(ddof=1) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in parts])
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        ax.plot(
            x, mean, color=color, marker=marker, markersize=4.5, linewidth=1.6, linestyle="-" if marker == "o" else "--"
        )
        ends.append((x[-1], mean[-1], f"{name}, mean {values.mean():.2f}", color))
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.set_xlabel("position in the text (tokens)")
    ax.set_ylabel("loss (nats per token)")
    label_ends(ax, ends)
    return figure


def visible_token(text: Any, limit: int = 12) -> str:
    """A token's text for a figure: spaces and newlines shown, unprintable characters as their code, cut to `limit`."""
    shown = str(text).replace(" ", "·").replace("\n", "⏎").replace("\t", "→")
    shown = "".join(c if c.isprintable() and ord(c) < 0x2E80 else f"<{ord(c):X}>" for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
