"""Training speed by layout: real runs of one preset, launched with other strategies, ranks and micro-batches."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tinylab.config.io import override
from tinylab.config.presets import preset as find_preset
from tinylab.config.presets import scale_tokens
from tinylab.config.schema import RunConfig
from tinylab.data.prepare import prepare
from tinylab.dist.launch import launch
from tinylab.dist.rank_logs import last_message
from tinylab.errors import ConfigError, LaunchError

WARMUP_STEPS = 5
"""First steps of each run, left out of its speed: memory is new and the loader's first shards are not read yet."""


def bench_scaling(
    preset: str | RunConfig = "tiny",
    ranks: Sequence[int] = (1, 2),
    strategies: Sequence[str] = ("ddp", "fsdp"),
    micro_batches: Sequence[int] = (8,),
    *,
    steps: int = 16,
    device: str = "auto",
    limit_mb: float | None = None,
) -> list[dict[str, Any]]:
    """Tokens/s of a preset's first stage on this machine, one row per layout, measured one after another.

    A layout is a strategy, a number of ranks and a micro-batch (sequences per forward pass on one rank, at most its
    share of the batch). One rank has strategy `none` and is measured once. `tokens_per_s`, over all ranks, is the
    median of a run of `steps` steps without its first five, `low` and `high` are the quartiles, `ratio` is to the first
    row that ran, `peak_memory_gib` is that of rank 0, a row's `steps` are those that count. A layout that cannot run
    says why in `refused` and has no numbers. Runs are deleted; their data stay: `limit_mb` megabytes of text (10^6
    bytes) from each source. Raises ConfigError for values that no layout can have, DataError as `prepare`, LaunchError
    if no layout ran.
    """
    config = find_preset(preset) if isinstance(preset, str) else preset
    if steps <= WARMUP_STEPS or min(ranks, default=0) < 1 or not strategies or not micro_batches:
        raise ConfigError(
            f"steps must be more than the {WARMUP_STEPS} of the warm-up, and ranks (at least 1), strategies and "
            f"micro_batches must not be empty; found steps = {steps}, ranks = {[*ranks]}, strategies = "
            f"{[*strategies]}, micro_batches = {[*micro_batches]}"
        )
    stage = config.stages[0]
    tokens, sequences = steps * stage.batch_tokens, stage.batch_tokens // config.model.seq_len
    changes = [f"data.sources.{i}.limit_mb={limit_mb!r}" for i in range(len(config.data.sources)) if limit_mb]
    changes += [f"saving.every_tokens={tokens}", "saving.early=false", f"parallel.device={device}"]
    changes += [f"validation.every_tokens={tokens}", "validation.sequences=8"]
    config = override(scale_tokens(replace(config, stages=(stage,)), tokens), changes)
    grid = product(strategies, ranks, micro_batches)
    layouts = dict.fromkeys(("none" if n == 1 else s, n, min(m, max(1, sequences // n))) for s, n, m in grid)
    configs = {
        (strategy, n, m): override(
            config, [f"parallel.strategy={'auto' if n == 1 else strategy}", f"parallel.micro_batch={m}"]
        )
        for strategy, n, m in layouts
    }
    prepare(config.data, progress=lambda line: None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tinylab-bench-") as folder:
        for i, ((strategy, n, m), laid_out) in enumerate(configs.items()):
            row = {"strategy": strategy, "ranks": n, "threads": None, "micro_batch": m, "tokens_per_s": None}
            row |= dict.fromkeys(("low", "high", "ratio", "peak_memory_gib", "steps", "device", "precision", "refused"))
            try:
                row |= _measure(laid_out, n, Path(folder, str(i)))
            except (ConfigError, LaunchError) as error:
                row["refused"] = str(error).partition(" (log: ")[0]  # the log goes with its run
            rows.append(row)
    speeds = [row["tokens_per_s"] for row in rows if row["refused"] is None]
    if not speeds:
        raise LaunchError("one layout at least must run; all were refused: " + "; ".join(r["refused"] for r in rows))
    for row in rows:
        row["ratio"] = row["tokens_per_s"] and round(row["tokens_per_s"] / speeds[0], 3)
    return rows


def _measure(config: RunConfig, ranks: int, folder: Path) -> dict[str, Any]:
    """What a run of `config` in the new `folder` shows. Raises what `launch` does, LaunchError if it fails later."""
    handle = launch(config, folder, mode="torchrun", nproc=ranks, tied=True)
    run = handle.run
    try:
        if handle.wait():
            logs = sorted(run.logs_path.glob("*.log"))  # the supervisor's is the last
            raise LaunchError(last_message("".join(path.read_text(errors="replace") for path in logs)))
    finally:
        handle.stop()  # an interrupted cell leaves no rank behind
    begun = next(line for line in run.journal() if line["event"] == "started")
    records = run.metric_records()
    speeds = [record["tokens_per_s"] for record in records[WARMUP_STEPS:]]
    low, middle, high = np.quantile(speeds, (0.25, 0.5, 0.75)).round(1)
    return {
        **{key: begun[key] for key in ("strategy", "threads", "device", "precision")},
        "tokens_per_s": float(middle),
        "low": float(low),
        "high": float(high),
        "peak_memory_gib": records[-1]["peak_memory_gib"],
        "steps": len(speeds),
    }
