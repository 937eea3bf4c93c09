"""How long a checkpoint holds up the steps: `Checkpointer.save` beside torch's `distributed.checkpoint.async_save`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from tinylab.bench.train import our_step, random_batches
from tinylab.checkpoint.checkpointer import Checkpointer
from tinylab.checkpoint.retention import saves_at
from tinylab.checkpoint.state import TrainState, build_state, optimizer_tensors
from tinylab.config.presets import preset as find_preset
from tinylab.config.schema import RunConfig
from tinylab.data.shards.reader import ShardSet
from tinylab.dist.context import open_context
from tinylab.errors import ConfigError
from tinylab.model.precision import resolve_precision
from tinylab.runs.folder import Run
from tinylab.runs.provenance import processor


@dataclass(frozen=True)
class _Tokenizer:
    """What a checkpoint takes from prepared data: a tokenizer's files and its ids."""

    tokenizer_path: Path
    manifest: dict[str, Any]
    fingerprint: str = "0" * 64


def bench_checkpoint(
    preset: str | RunConfig = "tiny", windows: int = 5, *, device: Literal["auto", "cpu", "cuda"] = "cpu"
) -> dict[str, Any]:
    """Seconds that a save holds up the steps, ours and torch's in turn, and the share of a run that ours amount to.

    Both copy weights and AdamW's moments into CPU memory and write them beside the steps; ours are also hashed, synced,
    committed under a manifest, and leave a Hugging Face folder. `blocked_s` is the call itself, `total_s` lasts until
    the checkpoint is complete; steps are taken meanwhile. `share` is the median `blocked_s` times the checkpoints of
    the preset, over all its steps at the median time of a step. One save of each is left out as warm-up. Raises
    ConfigError for no windows.
    """
    if windows < 1:
        raise ConfigError(f"windows must be at least 1; found {windows}")
    config = find_preset(preset) if isinstance(preset, str) else preset
    config = replace(config, parallel=replace(config.parallel, device=device))
    with open_context(config.parallel) as context, tempfile.TemporaryDirectory(prefix="tinylab-bench-") as place:
        state = build_state(config, context, None)
        precision = resolve_precision(context.device, config.parallel.precision)
        step = our_step(state, config, random_batches(config, context.device), precision, context)
        (folder := Path(place, "tokenizer")).mkdir()
        (folder / "tokenizer.json").write_text("{}")
        tokenizer = _Tokenizer(folder, {"tokenizer": {"bos_id": 1, "eos_id": 2, "hash": "", "boundary": "eos"}})
        run = Run(Path(place, "run"))
        run.create(config, {})
        step()
        with Checkpointer(run, config, context, cast(ShardSet, tokenizer), None) as checkpointer:
            savers: dict[str, Callable[[], Callable[[], bool]]] = {
                "tinylab": lambda: _ours(checkpointer, state),
                "torch async_save": lambda: _theirs(state, Path(place, f"theirs-{state.step}")),
            }
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in savers}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # the peer's, of its thread
                for _ in range(windows + 1):
                    for name, save in savers.items():
                        rounds[name].append(_measure(save, step))
        device_name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else processor()
        size = sum(t.nbytes for t in (*state.model.parameters(), *optimizer_tensors(state).values()))
    medians = {
        name: {key: statistics.median(r[key] for r in measured[1:]) for key in measured[0]}
        for name, measured in rounds.items()
    }
    saves = sum(saves_at(config, s) for s in range(1, config.steps + 1))
    ours, theirs = medians["tinylab"], medians["torch async_save"]
    return {
        "bench": "checkpoint",
        "against": f"torch {torch.__version__} distributed.checkpoint.async_save",
        "preset": config.preset,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "bytes": size,
        "windows": windows,
        "ratio_blocked": round(ours["blocked_s"] / theirs["blocked_s"], 3),
        "share": round(saves * ours["blocked_s"] / (config.steps * ours["step_s"]), 5),
        "saves": saves,
        "steps": config.steps,
        "medians": medians,
        "rounds": rounds,
        "device": device_name,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _ours(checkpointer: Checkpointer, state: TrainState) -> Callable[[], bool]:
    checkpointer.save(state)
    return lambda: bool(checkpointer.poll())


def _theirs(state: TrainState, folder: Path) -> Callable[[], bool]:
    from torch.distributed.checkpoint.state_dict_saver import async_save

    tensors = dict(state.model.named_parameters()) | optimizer_tensors(state)
    future = cast(Any, async_save(tensors, checkpoint_id=folder, no_dist=True))
    return lambda: future.done() and future.result() is not None


def _measure(save: Callable[[], Callable[[], bool]], step: Callable[[], object]) -> dict[str, float]:
    """Seconds of one step alone, of the save's call, until it is complete, and of the steps taken meanwhile."""
    step()
    began = time.perf_counter()
    step()
    saving = time.perf_counter()
    done = save()
    blocked = time.perf_counter()
    steps = 0
    while steps == 0 or not done():
        step()
        steps += 1
    ended = time.perf_counter()
    return {
        "step_s": saving - began,
        "blocked_s": blocked - saving,
        "total_s": ended - saving,
        "step_meanwhile_s": (ended - blocked) / steps,
    }
