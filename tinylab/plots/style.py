"""The look of every figure: palette, axes in tokens, labels at the ends of curves, stage marks, captions."""

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tinylab.config.counts import format_count

Table = Any
"""A pandas DataFrame; pandas' own types are too wide to compute with."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe-Ito in a fixed order; each at least 3:1 on white."""
AREAS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""For filled areas only: thin lines in yellow or sky blue cannot be seen."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D")
INK, FAINT, GRID = "#222222", "#666666", "#E3E3E3"


class LabFigure(Figure):
    """A Figure that shows itself as a PNG in a notebook, without pyplot."""

    def png(self, dpi: int = 130) -> bytes:
        """The figure as PNG bytes."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi, facecolor="white")
        return buffer.getvalue()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        width, height = (round(96 * side) for side in self.get_size_inches())
        picture = base64.b64encode(self.png()).decode()
        return {"image/png": picture, "text/plain": repr(self)}, {"image/png": {"width": width, "height": height}}


def new_figure(
    title: str, *, height: float, width: float = 7.6, rows: int = 1, columns: int = 1, caption: str = "", **grid: Any
) -> tuple[LabFigure, np.ndarray]:
    """A figure and its axes (rows, columns): title left, grid faint, caption under everything in grey."""
    figure = LabFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    caption = "\n".join(line for part in caption.splitlines() for line in textwrap.wrap(part, int(16.2 * width)))
    lines = caption.count("\n") + 1 if caption else 0
    foot, head = (0.17 * lines + 0.08) / height if lines else 0.0, 0.36 / height
    figure.get_layout_engine().set(rect=(0.004, foot, 0.992, 1 - foot - head), w_pad=0.06, h_pad=0.05)  # type: ignore[union-attr]
    literal: dict[str, Any] = {"ha": "left", "parse_math": False}  # names of runs may hold a $
    figure.text(0.012, 1 - 0.09 / height, title, va="top", fontsize=12, fontweight="bold", color=INK, **literal)
    if caption:
        figure.text(0.012, 0.06 / height, caption, va="bottom", fontsize=8, color=FAINT, linespacing=1.25, **literal)
    for ax in axes.flat:
        style_axes(ax)
    return figure, axes


def new_plot(title: str, *, height: float, width: float = 7.6, caption: str = "") -> tuple[LabFigure, Axes]:
    """A figure of one plot."""
    figure, axes = new_figure(title, width=width, height=height, caption=caption)
    return figure, axes[0, 0]


def style_axes(ax: Axes) -> None:
    """Open frame, faint grid, ticks in grey."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=FAINT, labelsize=9)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)


def token_axis(ax: Axes, label: str = "training tokens") -> None:
    """x in tokens, ticks as 500K, 1M, …"""
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlabel(label)


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], lines: int = 1) -> None:
    """Text behind the end of each series (y, text of `lines` lines, colour), moved apart where it would overlap.

    Call it after the limits are final.
    """
    gap = 0.185 * lines / max(ax.get_figure().get_figheight() - 1.3, 1.0)  # type: ignore[union-attr]
    ax.get_ylim()  # brings the limits up to date
    to_axes = ax.transScale + ax.transLimits
    ordered = sorted((float(to_axes.transform((1.0, y))[1]), text, color) for y, text, color in ends)
    places: list[float] = []
    for share, _, _ in ordered:
        places.append(max(share, places[-1] + gap) if places else share)
    over = max(0.0, places[-1] - 1.0) if places else 0.0
    for (_, text, color), place in zip(ordered, places, strict=True):
        write_behind(ax, place - over, text, color, fontsize=9, coordinates="axes fraction")


def write_behind(
    ax: Axes, y: float, text: str, color: str = FAINT, *, fontsize: float = 8.5, coordinates: str = "data"
) -> None:
    """Text to the right of the axes at height y."""
    ax.annotate(
        text, (1.0, y), xycoords=("axes fraction", coordinates), xytext=(5, 0), textcoords="offset points",
        va="center", color=color, fontsize=fontsize, annotation_clip=False, parse_math=False,
    )  # fmt: skip


def mark_stages(ax: Axes, config: Any) -> None:
    """A thin line where a stage ends, and each stage's name above its stretch; nothing for a run of one stage."""
    if len(config.stages) < 2:
        return
    start = 0
    for stage, (_, last) in zip(config.stages, config.stage_bounds(), strict=True):
        end = config.tokens_at(last)
        if end < config.tokens:
            ax.axvline(end, color="#888888", linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        ax.annotate(
            stage.name, ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
            textcoords="offset points", ha="center", va="bottom", fontsize=8.5, color=FAINT, annotation_clip=True,
            parse_math=False,
        )  # fmt: skip
        start = end


def empty(figure: LabFigure, message: str) -> LabFigure:
    """The figure, saying in its first axes why there is nothing to see; the others are hidden."""
    first, *others = figure.axes
    first.text(0.5, 0.5, message, ha="center", va="center", color=FAINT, transform=first.transAxes, wrap=True)
    first.set_xticks([])
    first.set_yticks([])
    for ax in others:
        ax.set_visible(False)
    return figure
