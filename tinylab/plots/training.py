"""What happened while training: loss, validation, learning rate, gradient norm, speed and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from tinylab.config.counts import format_count
from tinylab.errors import ConfigError
from tinylab.optim.schedule import lr_at
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
    new_plot,
    token_axis,
)

_X_LABELS = {
    "tokens": "training tokens",
    "step": "optimizer steps",
    "hours": "hours of training (sum of step times)",
}


@dataclass(frozen=True)
class _Series:
    """The metrics of one run and how they look: neighbours differ in colour and dash, and no two of sixteen agree."""

    label: str
    metrics: Table
    config: Any
    """None where only a table was given."""
    color: str
    dash: Any
    marker: str

    def points(self, name: str, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """(x, value) wherever the metric was measured; x is `tokens`, `step` or `hours`."""
        if name not in self.metrics:
            return np.array([]), np.array([])
        values = self.metrics[name].to_numpy(float)
        at = self.metrics["step_time_s"].cumsum() / 3600 if x == "hours" else self.metrics[x]
        return at.to_numpy(float)[np.isfinite(values)], values[np.isfinite(values)]


def _series(runs: Sequence[Any]) -> list[_Series]:
    found = []
    for i, run in enumerate(runs):
        label, metrics, config = (*run, None) if isinstance(run, tuple) else (run.name, run.metrics(), run.config)
        found.append(_Series(str(label), metrics, config, COLORS[i % 4], DASHES[(i + i // 4) % 4], MARKERS[i % 4]))
    return found


def loss_curves(runs: Sequence[Any], smooth: float | None = None, x: str = "tokens") -> LabFigure:
    """Training loss (raw faint, smoothed bold) and validation loss over tokens, runs overlaid.

    `runs` are Run objects or (label, DataFrame of metrics) pairs; `smooth` is the width of the moving mean in tokens
    (default: a fortieth of the longest run); `x` is `tokens`, `step` or `hours`. Raises ConfigError for another `x`.
    """
    if x not in _X_LABELS:
        raise ConfigError(f"x must be one of {', '.join(_X_LABELS)}; found {x!r}")
    series = _series(runs)
    longest = max((float(s.metrics["tokens"].iloc[-1]) for s in series if len(s.metrics)), default=0.0)
    width = longest / 40 if smooth is None else smooth
    figure, ax = new_plot(
        _title("Loss over training", series),
        height=4.3,
        caption=f"Faint: loss of every step, mean over its batch. Bold: mean over the last {format_count(width)} "
        "tokens. Markers: validation loss on held-out documents.",
    )
    ends, alone = [], len(series) == 1
    for s in series:
        tokens, loss = s.points("loss")
        if not len(loss):
            continue
        xs, smoothed = s.points("loss", x)[0], moving_mean(tokens, loss, width)
        ax.plot(xs, loss, color=s.color, alpha=0.22, linewidth=0.8)
        ax.plot(xs, smoothed, color=s.color, linestyle=s.dash, linewidth=2.0)
        ends.append((smoothed[-1], f"{'training' if alone else s.label} {smoothed[-1]:.2f}", s.color))
        at, values = s.points("validation_loss", x)
        if len(values):
            accent = COLORS[1] if alone else s.color
            ax.plot(at, values, color=accent, linewidth=1.2, linestyle=DASHES[1], alpha=0.85)
            ax.plot(at, values, s.marker, color=accent, markersize=5, markeredgecolor="white", markeredgewidth=0.8)
            if len(series) <= 2:
                name = "validation" if alone else f"{s.label}, validation"
                ends.append((values[-1], f"{name} {values[-1]:.2f}", accent))
    return _finished(figure, series, ends, "loss (nats per token)", "no steps yet", x)


def validation_bits(runs: Sequence[Any]) -> LabFigure:
    """Bits per byte of held-out text over tokens: comparable across tokenizers."""
    series = _series(runs)
    figure, ax = new_plot(
        _title("Compression of held-out text", series),
        height=3.6,
        caption="Bits per byte = validation nats / (ln 2 × bytes of the predicted text); independent of the tokenizer.",
    )
    ends = []
    for s in series:
        at, values = s.points("bits_per_byte")
        if len(values):
            ax.plot(at, values, color=s.color, linestyle=s.dash, marker=s.marker, markersize=5, linewidth=1.6)
            ends.append((values[-1], f"{s.label if len(series) > 1 else ''} {values[-1]:.2f}".strip(), s.color))
    return _finished(figure, series, ends, "bits per byte", "validation has not been measured yet")


def learning_rate(config: Any) -> LabFigure:
    """The learning rate that the configuration prescribes, over its tokens, with its stages."""
    steps = np.unique(np.linspace(1, config.steps, min(600, config.steps)).round().astype(int)).tolist()
    tokens, rates = [config.tokens_at(step) for step in steps], [lr_at(config, step) for step in steps]
    figure, ax = new_plot(
        f"Learning rate, preset {config.preset}" if config.preset else "Learning rate",
        height=3.2,
        caption=f"Warm-up over {format_count(config.schedule.warmup_tokens)} tokens, then {config.schedule.kind}; "
        f"peak {config.optimizer.lr:g}. Computed from the configuration.",
    )
    ax.plot(tokens, rates, color=COLORS[0], linewidth=2)
    ax.set_ylim(0, max(rates) * 1.06)
    ax.margins(x=0.01)
    ax.set_ylabel("learning rate (per step)")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    token_axis(ax)
    mark_stages(ax, config)
    label_ends(ax, [(rates[-1], f"{rates[-1]:.1e}", COLORS[0])])
    return figure


def gradient_norm(runs: Sequence[Any]) -> LabFigure:
    """Gradient norm before clipping, per step, log scale, with the clipping threshold where a run has one."""
    series = _series(runs)
    figure, ax = new_plot(
        _title("Gradient norm", series),
        height=3.2,
        caption="Norm over all parameters, before clipping; log scale. Faint: every step. Bold: mean over the last "
        "fortieth of the run's tokens. Dashed, grey: the clipping threshold.",
    )
    ends = []
    for s in series:
        xs, norms = s.points("grad_norm")
        xs, norms = xs[norms > 0], norms[norms > 0]
        if not len(norms):
            continue
        smoothed = moving_mean(xs, norms, xs[-1] / 40)
        ax.plot(xs, norms, color=s.color, linewidth=0.8, alpha=0.3)
        ax.plot(xs, smoothed, color=s.color, linestyle=s.dash, linewidth=1.8)
        ends.append((smoothed[-1], f"{s.label} {smoothed[-1]:.2f}", s.color))
        if s.config and s.config.optimizer.clip_norm:
            ax.axhline(s.config.optimizer.clip_norm, color=FAINT, linewidth=1, linestyle=DASHES[1])
    if ends:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, series, ends, "gradient norm (L2, log scale)", "no gradient norms recorded")


def throughput(runs: Sequence[Any]) -> LabFigure:
    """Tokens per second, with the median and the share of time spent waiting for data, and peak memory over tokens."""
    series = _series(runs)
    figure, axes = new_figure(
        _title("Speed and memory", series),
        columns=2,
        width=8.6,
        height=3.4,
        caption="Left: every step but the run's first; the line is the run's median. Right: peak memory of rank 0.\n"
        "Data wait is the share of step time in which the trainer waited for the loader.",
    )
    speed, memory = axes[0]
    ends, top = [], 0.0
    for s in (s for s in series if len(s.metrics) > 1):
        rows = s.metrics.iloc[1:]
        tokens, rates = rows["tokens"].to_numpy(float), rows["tokens_per_s"].to_numpy(float)
        middle, wait = float(np.nanmedian(rates)), float(rows["data_wait_s"].sum() / rows["step_time_s"].sum())
        speed.plot(tokens, rates, ".", color=s.color, markersize=3, alpha=0.4)
        speed.plot([tokens[0], tokens[-1]], [middle] * 2, color=s.color, linestyle=s.dash, linewidth=1.8)
        ends.append((middle, f"{s.label}\n{format_count(middle)} tokens/s\ndata wait {wait:.1%}", s.color))
        memory.plot(tokens, rows["peak_memory_gib"], color=s.color, linestyle=s.dash, linewidth=1.8)
        top = max(top, float(np.nanpercentile(rates, 98)))
    if not ends:
        return empty(figure, "fewer than two steps")
    speed.set(ylim=(0, top * 1.2), ylabel="tokens/s, all ranks")
    memory.set(ylim=(0, 1.08 * memory.dataLim.y1), ylabel="peak memory (GiB)")
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


def _title(what: str, series: Sequence[_Series]) -> str:
    """`what`, and whose, where the names fit."""
    names = ", ".join(s.label for s in series)
    return f"{what}: {names}" if 0 < len(names) <= 48 else what


def _finished(
    figure: LabFigure, series: Sequence[_Series], ends: list[Any], label: str, missing: str, x: str = "tokens"
) -> LabFigure:
    """The figure with units, end labels and stage marks; the words `missing` where there is nothing to draw."""
    if not ends:
        return empty(figure, missing)
    ax = figure.axes[0]
    ax.margins(x=0.01)
    ax.set(ylabel=label, xlabel=_X_LABELS[x])
    label_ends(ax, ends)
    if x == "tokens":
        token_axis(ax)
        configs = [s.config for s in series if s.config is not None]
        if configs and all(c.stages == configs[0].stages for c in configs):
            limits = ax.get_xlim()
            mark_stages(ax, configs[0])
            ax.set_xlim(limits)
    return figure
