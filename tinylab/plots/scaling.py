"""Speed by layout: strategies, ranks and micro-batches side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from tinylab.config.counts import format_count
from tinylab.plots.style import AREAS, FAINT, INK, LabFigure, empty, new_plot, token_axis, write_behind


def scaling(rows: Sequence[Mapping[str, Any]]) -> LabFigure:
    """Tokens/s of every layout that ran, as bars with quartiles, each with its number and its ratio to the first.

    `rows` are those of `bench_scaling` (tinylab/bench/scaling.py).
    """
    ran = [row for row in rows if row["refused"] is None]
    refused = f" Refused: {len(rows) - len(ran)} of {len(rows)}; the table says why." if len(ran) < len(rows) else ""
    figure, ax = new_plot(
        "Speed by layout",
        height=1.45 + 0.5 * max(len(ran), 1),
        caption="Median of the steps after warm-up, over all ranks; whiskers: quartiles of the steps. Dashed line: the "
        f"first row.{refused}",
    )
    if not ran:
        return empty(figure, "no layout ran")
    colors = {name: AREAS[i % 8] for i, name in enumerate(dict.fromkeys(row["strategy"] for row in ran))}
    for at, row in enumerate(ran):
        speed = row["tokens_per_s"]
        ax.barh(at, speed, color=colors[row["strategy"]], height=0.6)
        spread = [[speed - row["low"]], [row["high"] - speed]]
        ax.errorbar(speed, at, xerr=spread, color=INK, elinewidth=1.2, capsize=3)
        write_behind(ax, at, f"{format_count(speed)} tokens/s, {row['ratio']:.2f} ×", INK, fontsize=9)
    ax.axvline(ran[0]["tokens_per_s"], color=FAINT, linewidth=1, linestyle=(0, (5, 1.5)))
    ax.set_yticks(range(len(ran)), [_name(row) for row in ran])
    ax.set(xlim=(0, 1.04 * max(row["high"] for row in ran)), ylim=(len(ran) - 0.5, -0.5))
    ax.grid(False, axis="y")
    token_axis(ax, "tokens/s, all ranks")
    return figure


def _name(row: Mapping[str, Any]) -> str:
    """`fsdp, 2 ranks × 1 thread, micro-batch 8`."""
    counts = (f"{row[key]} {key[:-1] if row[key] == 1 else key}" for key in ("ranks", "threads"))
    strategy = "" if row["strategy"] == "none" else f"{row['strategy']}, "
    return f"{strategy}{' × '.join(counts)}, micro-batch {row['micro_batch']}"
