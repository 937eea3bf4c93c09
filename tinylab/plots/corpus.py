"""What the data look like: mixture over the run, lengths of documents, frequencies of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinylab.plots.style import (
    AREAS,
    COLORS,
    DASHES,
    FAINT,
    LabFigure,
    empty,
    label_ends,
    mark_stages,
    new_plot,
    token_axis,
)


def mixture_of(run: Any) -> LabFigure:
    """Share of each source in the samples over a run's tokens, ramps included, with stage marks.

    `run` is a Run or a RunConfig; the shares are those that the configuration prescribes.
    """
    config = getattr(run, "config", run)
    x, shares = mixture_points(config)
    figure, ax = new_plot(
        "Mixture of the training data",
        height=3.4,
        caption="Share of samples by source, as the configuration prescribes it; ramps are linear.",
    )
    ax.stackplot(x, 100 * np.array(list(shares.values())), colors=AREAS[: len(shares)], alpha=0.85, linewidth=0)
    ax.set(ylim=(0, 100), xlim=(0, x[-1]), ylabel="share of samples (%)")
    token_axis(ax)
    mark_stages(ax, config)
    bottom, ends = 0.0, []
    for name, values, color in zip(shares, shares.values(), AREAS * len(shares), strict=False):
        readable = "#9A6A00" if color == "#E69F00" else color
        ends.append((bottom + 50 * values[-1], f"{name} {values[-1]:.0%}", readable))
        bottom += 100 * values[-1]
    label_ends(ax, ends)
    return figure


def mixture_points(config: Any) -> tuple[list[int], dict[str, list[float]]]:
    """Corners of the mixture over tokens: x, and for each source its shares there."""
    x: list[int] = []
    mixtures: list[Mapping[str, float]] = []
    start, before = 0, config.mixture(0)
    for i, (stage, (_, last)) in enumerate(zip(config.stages, config.stage_bounds(), strict=True)):
        end, after = config.tokens_at(last), config.mixture(i)
        x += [start, min(start + stage.ramp_tokens, end), end]
        mixtures += [before if stage.ramp_tokens else after, after, after]
        start, before = end, after
    return x, {name: [mixture[name] for mixture in mixtures] for name in config.data.source_names}


def document_lengths(lengths: Mapping[str, Sequence[int]]) -> LabFigure:
    """Histogram of document lengths in tokens, by source, on a log scale; medians marked."""
    figure, ax = new_plot(
        "Length of documents",
        height=3.4,
        caption="Share of each source's documents; log scale. Vertical lines: medians.",
    )
    top = 0.0
    known = {name: np.asarray(values, dtype=float) for name, values in lengths.items() if len(values)}
    if not known:
        return empty(figure, "no documents")
    bins = np.geomspace(1, 1.05 * max(2.0, *(float(v.max()) for v in known.values())), 40)
    for i, (name, values) in enumerate(known.items()):
        counts, _ = np.histogram(np.maximum(values, 1), bins=bins)
        shares = 100 * counts / len(values)
        middle, color = float(np.median(values)), COLORS[i % 4]
        ax.stairs(shares, bins, color=color, fill=True, alpha=0.18)
        ax.stairs(shares, bins, color=color, linewidth=1.8, linestyle=DASHES[i % 4])
        ax.axvline(middle, color=color, linewidth=1.2, linestyle=":")
        ax.text(0.99, 0.97 - 0.09 * i, f"{name}: {len(values):,} documents, median {middle:,.0f} tokens",
                color=color, transform=ax.transAxes, ha="right", va="top", fontsize=9, parse_math=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
        top = max(top, float(shares.max()))
    ax.set(xscale="log", ylim=(0, top * (1.15 + 0.12 * len(known))), xlabel="tokens per document (log scale)")
    ax.set_ylabel("share of documents (%)")
    return figure


def token_frequencies(counts: Mapping[str, Sequence[int]]) -> LabFigure:
    """Frequency of vocabulary entries by rank, by source, both axes log; the line of slope −1 is Zipf's.

    `counts` holds, for each source, the number of times that each id occurs.
    """
    figure, ax = new_plot(
        "Frequency of tokens by rank",
        height=3.6,
        caption="Share of all tokens; both scales are log. Grey: slope −1 (Zipf).",
    )
    ends = []
    for i, (name, values) in enumerate(counts.items()):
        ordered = np.sort(np.asarray(values, dtype=float))[::-1]
        used = ordered[ordered > 0]
        if not len(used):
            continue
        share = used / used.sum()
        ax.plot(np.arange(1, len(used) + 1), share, color=COLORS[i % 4], linestyle=DASHES[i % 4], linewidth=1.8)
        ends.append((share[-1], f"{name}: {len(used):,} of {len(ordered):,} ids used", COLORS[i % 4]))
    if not ends:
        return empty(figure, "no tokens")
    limits = ax.get_ylim()
    ax.set(xscale="log", yscale="log")
    low, high = ax.get_ylim()
    x = ax.get_xlim()
    ax.plot(x, [high / 3 / rank for rank in x], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    ax.set(xlim=x, ylim=(low, min(high, 10 * limits[1])), xlabel="rank of the id (log scale)")
    ax.set_ylabel("share of tokens (log scale)")
    label_ends(ax, ends)
    return figure
