"""What happened while training: loss, validation, learning rate, gradient norm, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from tinylab.config.counts import format_count
from tinylab.errors import ConfigError
from tinylab.plots.style import (
    COLORS,
    DASHES,
    FAINT,
    MARKERS,
    LabFigure,
    Table,
    empty,
    label_ends,
    mark_stages,
    new_figure,
    token_axis,
)

_X_LABELS = {
    "tokens": "training tokens",
    "step": "optimizer steps",
    "hours": "hours of training (sum of step times)",
}


def loss_curves(runs: Sequence[Any], smooth: float | None = None, x: str = "tokens") -> LabFigure:
    """Training loss (raw faint, smoothed bold) and validation loss over tokens, runs overlaid.

    `runs` are Run objects or (label, DataFrame of metrics) pairs; `smooth` is the width of the moving mean in tokens
    (default: a fortieth of the longest run); `x` is `tokens`, `step` or `hours`. Raises ConfigError for another `x`.
    """
    if x not in _X_LABELS:
        raise ConfigError(f"x must be one of {', '.join(_X_LABELS)}; found {x!r}")
    series = [_series(run) for run in runs]
    longest = max((float(m["tokens"].iloc[-1]) for _, m, _ in series if len(m)), default=0.0)
    width = longest / 40 if smooth is None else smooth
    figure, axes = new_figure(
        _title("Loss over training", series),
        height=4.3,
        caption=f"Faint: every step's loss, mean over the global batch. Bold: mean over the last "
        f"{format_count(width)} tokens. "
        "Markers: validation loss on held-out documents.",
    )
    ax, ends = axes[0, 0], []
    for i, (label, metrics, _) in enumerate(series):
        if not len(metrics):
            continue
        color, dash = _look(i)
        xs = _x_values(metrics, x)
        smoothed = moving_mean(metrics["tokens"].to_numpy(float), metrics["loss"].to_numpy(float), width)
        ax.plot(xs, metrics["loss"], color=color, alpha=0.22, linewidth=0.8)
        ax.plot(xs, smoothed, color=color, linestyle=dash, linewidth=2.0)
        name = "training" if len(series) == 1 else label
        ends.append((xs[-1], smoothed[-1], f"{name} {smoothed[-1]:.2f}", color))
        measured = _measured(metrics, "validation_loss")
        if len(measured):
            accent = COLORS[1] if len(series) == 1 else color
            at, values = _x_values(metrics, x)[measured.index], measured.to_numpy(float)
            ax.plot(at, values, color=accent, linewidth=1.2, linestyle=DASHES[1], alpha=0.85)
            ax.plot(
                at, values, MARKERS[i % 4], color=accent, markersize=5, markeredgecolor="white", markeredgewidth=0.8
            )
            if len(series) <= 2:
                tail = "validation" if len(series) == 1 else f"{label}, validation"
                ends.append((at[-1], values[-1], f"{tail} {values[-1]:.2f}", accent))
    return _finished(figure, series, ends, "loss (nats per token)", "no steps yet", x)


def validation_bits(runs: Sequence[Any]) -> LabFigure:
    """Bits per byte of held-out text over tokens: comparable across tokenizers."""
    series = [_series(run) for run in runs]
    figure, axes = new_figure(
        _title("Compression of held-out text", series),
        height=3.6,
        caption="Bits per byte = validation nats / (ln 2 x bytes of the predicted text); independent of the tokenizer.",
    )
    ax, ends = axes[0, 0], []
    for i, (label, metrics, _) in enumerate(series):
        measured = _measured(metrics, "bits_per_byte")
        if not len(measured):
            continue
        color, dash = _look(i)
        at, values = metrics["tokens"][measured.index].to_numpy(float), measured.to_numpy(float)
        ax.plot(at, values, color=color, linestyle=dash, marker=MARKERS[i % 4], markersize=5, linewidth=1.6)
        ends.append(
            (at[-1], values[-1], f"{label} {values[-1]:.2f}" if len(series) > 1 else f"{values[-1]:.2f}", color)
        )
    return _finished(figure, series, ends, "bits per byte", "validation has not been measured yet")


def learning_rate(config: Any, points: int = 600) -> LabFigure:
    """The learning rate that the configuration prescribes, over its tokens, with its stages."""
    from tinylab.optim.schedule import lr_at

    steps = np.unique(np.linspace(1, config.steps, min(points, config.steps)).round().astype(int))
    tokens = [config.tokens_at(int(s)) for s in steps]
    rates = [lr_at(config, int(s)) for s in steps]
    figure, axes = new_figure(
        f"Learning rate, preset {config.preset}" if config.preset else "Learning rate",
        height=3.2,
        caption=f"Warm-up over {format_count(config.schedule.warmup_tokens)} tokens, then {config.schedule.kind}; "
        f"peak {config.optimizer.lr:g}. Computed from the configuration.",
    )
    ax = axes[0, 0]
    ax.plot(tokens, rates, color=COLORS[0], linewidth=2)
    ax.set_ylim(0, max(rates) * 1.06)
    ax.margins(x=0.01)
    ax.set_ylabel("learning rate (per step)")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    token_axis(ax)
    mark_stages(ax, config)
    label_ends(ax, [(tokens[-1], rates[-1], f"{rates[-1]:.1e}", COLORS[0])])
    return figure


def gradient_norm(runs: Sequence[Any]) -> LabFigure:
    """Gradient norm before clipping, per step, log scale, with the clipping threshold where a run has one."""
    series = [_series(run) for run in runs]
    figure, axes = new_figure(
        _title("Gradient norm", series),
        height=3.2,
        caption="Global norm before clipping; log scale. Faint: every step. Bold: mean over the last fortieth of the "
        "run's tokens. Dashed, grey: the clipping threshold.",
    )
    ax, ends = axes[0, 0], []
    for i, (label, metrics, config) in enumerate(series):
        known = _measured(metrics, "grad_norm")
        known = known[known > 0]
        if not len(known):
            continue
        xs, (color, dash) = metrics["tokens"][known.index].to_numpy(float), _look(i)
        smoothed = moving_mean(xs, known.to_numpy(float), xs[-1] / 40)
        ax.plot(xs, known, color=color, linewidth=0.8, alpha=0.3)
        ax.plot(xs, smoothed, color=color, linestyle=dash, linewidth=1.8)
        ends.append((xs[-1], smoothed[-1], f"{label} {smoothed[-1]:.2f}", color))
        clip = getattr(getattr(config, "optimizer", None), "clip_norm", None)
        if clip:
            ax.axhline(clip, color=FAINT, linewidth=1, linestyle=DASHES[1])
    if ends:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, series, ends, "gradient norm (L2, log scale)", "no gradient norms recorded")


def throughput(runs: Sequence[Any]) -> LabFigure:
    """Tokens per second, share of time waiting for data, and peak memory over tokens; each run's median is named."""
    series = [_series(run) for run in runs]
    figure, axes = new_figure(
        _title("Speed and memory", series),
        columns=2,
        width=8.6,
        height=3.4,
        caption="Left: every step but the run's first; the line is the run's median. Right: peak memory of rank 0.\n"
        "Data wait is the share of step time in which the trainer waited for the loader.",
    )
    speed, memory = axes[0]
    ends = []
    for i, (label, metrics, _) in enumerate(series):
        if len(metrics) < 2:
            continue
        rows, (color, dash) = metrics.iloc[1:], _look(i)
        tokens, rates = rows["tokens"].to_numpy(float), rows["tokens_per_s"].to_numpy(float)
        middle, wait = float(np.nanmedian(rates)), float(rows["data_wait_s"].sum() / rows["step_time_s"].sum())
        speed.plot(tokens, rates, ".", color=color, markersize=3, alpha=0.4)
        speed.plot([tokens[0], tokens[-1]], [middle] * 2, color=color, linestyle=dash, linewidth=1.8)
        ends.append((tokens[-1], middle, f"{label}\n{format_count(middle)} tokens/s\ndata wait {wait:.1%}", color))
        memory.plot(tokens, rows["peak_memory_gib"], color=color, linestyle=dash, linewidth=1.8)
    if not ends:
        empty(speed, "fewer than two steps")
        empty(memory, "fewer than two steps")
        return figure
    speed.set_ylim(0, max(np.nanpercentile(m["tokens_per_s"].iloc[1:], 98) for _, m, _ in series if len(m) > 1) * 1.2)
    speed.set_ylabel("tokens/s, all ranks")
    memory.set_ylim(0, 1.08 * memory.dataLim.y1)
    memory.set_ylabel("peak memory (GiB)")
    for ax in (speed, memory):
        ax.margins(x=0.02)
        token_axis(ax)
    label_ends(speed, ends, lines=3)
    return figure


def moving_mean(tokens: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    """Mean of the values of the last `width` tokens at each point, missing values left out; `tokens` ascend."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first = np.minimum(np.searchsorted(tokens, tokens - width, side="right"), np.arange(len(tokens)))
    last = np.arange(1, len(tokens) + 1)
    number = counts[last] - counts[first]
    return np.where(number > 0, (sums[last] - sums[first]) / np.maximum(number, 1), np.nan)


def _look(i: int) -> tuple[str, Any]:
    """(colour, dash) of series i: neighbours differ in both, and no two of the first sixteen are alike."""
    return COLORS[i % 4], DASHES[(i + i // 4) % 4]


def _title(what: str, series: Sequence[tuple[str, Any, Any]]) -> str:
    """`what`, and whose, where the names fit."""
    names = ", ".join(label for label, _, _ in series)
    return f"{what}: {names}" if 0 < len(names) <= 48 else what


def _finished(
    figure: LabFigure, series: list[tuple[str, Any, Any]], ends: list[Any], label: str, missing: str, x: str = "tokens"
) -> LabFigure:
    """The figure with units, end labels and stage marks; the words `missing` where there is nothing to draw."""
    ax = figure.axes[0]
    if not ends:
        empty(ax, missing)
        return figure
    ax.margins(x=0.01)
    ax.set_ylabel(label)
    ax.set_xlabel(_X_LABELS[x])
    if x == "tokens":
        token_axis(ax)
    label_ends(ax, ends)
    configs = [config for _, _, config in series if config is not None]
    if x == "tokens" and configs and all(c.stages == configs[0].stages for c in configs):
        limits = ax.get_xlim()
        mark_stages(ax, configs[0])
        ax.set_xlim(limits)
    return figure


def _series(run: Any) -> tuple[str, Table, Any]:
    """(label, metrics with a plain index, configuration or None) of a Run or a (label, DataFrame) pair."""
    if isinstance(run, tuple):
        return str(run[0]), run[1].reset_index(drop=True), None
    return run.name, run.metrics().reset_index(drop=True), run.config


def _measured(metrics: Table, name: str) -> Any:
    """The values of a metric where it was measured."""
    import pandas

    if name not in metrics:
        return pandas.Series([], dtype=float)
    numbers: Any = pandas.to_numeric(metrics[name])
    return numbers.dropna()


def _x_values(metrics: Table, x: str) -> np.ndarray:
    if x == "hours":
        return metrics["step_time_s"].cumsum().to_numpy(float) / 3600
    return metrics[x].to_numpy(float)
