"""The attention backend of a run: chosen before its first step, kept in `attention.json`, the same on every rank."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from tinylab.config.schema import RunConfig
from tinylab.dist.context import Context
from tinylab.errors import CheckpointError, ConfigError
from tinylab.model.attention import BACKENDS, TORCH
from tinylab.model.attention_choice import choose_attention
from tinylab.model.precision import resolve_precision
from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import Run
from tinylab.runs.regular import read_json


def choose_backend(config: RunConfig, run: Run, context: Context) -> dict[str, Any]:
    """What `attention.json` holds: name, median seconds of each backend measured, and what the choice was made for.

    Every rank tries a named backend for itself; raises ConfigError if it cannot run. For `auto` rank 0 decides: the
    choice kept in the run if it was made for the same and its backend still runs, else a new one.
    """
    model, parallel, documents = config.model, config.parallel, config.data.document_mask
    device, asked = context.device, parallel.attention
    dtype = resolve_precision(device, parallel.precision).dtype

    def choose(wanted: Any) -> tuple[str, dict[str, float]]:
        return choose_attention(model, replace(parallel, attention=wanted), device, dtype, documents=documents)

    made_for = {
        "asked": asked,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [parallel.micro_batch, model.n_head, model.n_kv_head, model.seq_len, model.head_size],
        "document_mask": documents,
    }
    if asked != "auto":
        name, seconds = choose(asked)
    elif context.is_main:
        kept = _kept(run)
        name, seconds = "", {}
        if kept.items() >= made_for.items():
            with suppress(ConfigError):
                name, seconds = choose(kept["name"])[0], kept["median_s"]
        if not name:
            name, seconds = choose(asked)
    else:
        name, seconds = TORCH.name, {}
    names = list(BACKENDS)
    index = context.sum_integers([names.index(name) if context.is_main else 0])[0]
    return {"name": names[index], "median_s": seconds, **made_for}


def keep_choice(choice: dict[str, Any], run: Run) -> None:
    """Rank 0: write a choice that is new into the journal and `attention.json`; torch's own, unmeasured, is none."""
    kept = _kept(run)
    unmeasured = choice["asked"] == "auto" and not choice["median_s"]
    if choice == kept or (unmeasured and not kept):
        return
    run.write_journal("attention", **choice)
    write_atomic(run.attention_path, json.dumps(choice, indent=1))


def _kept(run: Run) -> dict[str, Any]:
    """The choice kept in the run; empty where there is none that can be read: it is then made anew."""
    with suppress(CheckpointError, FileNotFoundError):
        kept = read_json(run.attention_path)
        return kept if isinstance(kept, dict) and {"name", "median_s"} <= kept.keys() else {}
    return {}
