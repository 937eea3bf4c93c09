"""Opening a checkpoint beside transformers' `from_pretrained`: time and peak memory, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tinylab.checkpoint.huggingface import save_weights, write_config
from tinylab.config.presets import preset as find_preset
from tinylab.model.transformer import Llama

_MEASURE = """
import json, resource, sys, time
import torch
{imports}
folder = sys.argv[1]
ids = torch.arange(8).view(1, 8)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
model = {load}
opened = time.perf_counter() - start
opened_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    total = float({logits}.float().sum())
used = time.perf_counter() - start
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"open_s": opened, "first_logits_s": used, "base_kib": base, "open_kib": opened_kib,
                  "peak_kib": peak_kib, "sum": total}}))
"""
_CONTENDERS = {
    "tinylab": _MEASURE.format(
        imports="from tinylab.checkpoint.reference import load_model",
        load="load_model(folder)",
        logits="model(ids)",
    ),
    "transformers": _MEASURE.format(
        imports="import transformers\nfrom transformers import LlamaForCausalLM\n"
        "transformers.utils.logging.disable_progress_bar()",
        load="LlamaForCausalLM.from_pretrained(folder).eval()",
        logits="model(ids).logits",
    ),
}
"""Imports come before the clock; what a library imports while it loads counts."""


def bench_opening(preset: str = "tinyllama_1b", windows: int = 5) -> dict[str, Any]:
    """Seconds and peak memory to open a bf16 Hugging Face folder of `preset`'s shape, ours and theirs in turn.

    Weights are random. Both libraries map files and leave pages unread when they open, so the first logits (8 tokens)
    are measured too: by then every weight was read. Peak memory is that of the whole process (maximum resident set).
    `ratio_*` are medians of tinylab over transformers. One round of each is left out as warm-up of the page cache.
    """
    with tempfile.TemporaryDirectory(prefix="tinylab-bench-") as folder:
        config = find_preset(preset).model
        model = Llama.empty(config, "cpu", torch.bfloat16)
        model.init_weights(0)
        save_weights(model.state_dict(), config, folder)
        write_config(config, folder, bos_id=1, eos_id=2, dtype="bfloat16")
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        del model
        rounds = {name: [_measure(code, folder)] for name, code in _CONTENDERS.items()}
        for _ in range(windows):
            for name, code in _CONTENDERS.items():
                rounds[name].append(_measure(code, folder))
    medians = {
        name: {key: statistics.median(r[key] for r in measured[1:]) for key in measured[0]}
        for name, measured in rounds.items()
    }
    ours, theirs = medians["tinylab"], medians["transformers"]
    ratios = {f"ratio_{key}": ours[key] / theirs[key] for key in ("open_s", "first_logits_s", "open_kib", "peak_kib")}
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
    return {"bench": "opening", "preset": preset, "bytes": size, "windows": windows, **ratios, "medians": medians} | {
        "rounds": rounds,
        "versions": versions,
    }


def _measure(code: str, folder: str) -> dict[str, float]:
    """One contender in a fresh interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
