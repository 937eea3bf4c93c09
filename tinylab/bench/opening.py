"""Opening a checkpoint beside transformers' `from_pretrained`: time and peak memory, each in a process of its own."""

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tinylab.bench.sides import conditions, in_turn, shape_of
from tinylab.config.architecture import Model
from tinylab.errors import TinylabError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.model.accounting import parameter_counts
from tinylab.model.transformer import Llama

_MEASURE = """
import json, resource, sys, time
import torch
{imports}
def peak_kib():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
folder = sys.argv[1]
ids = torch.arange(8).view(1, 8)
base = peak_kib()
start = time.perf_counter()
model = {load}
opened = time.perf_counter() - start
opened_kib = peak_kib()
with torch.inference_mode():
    logits = {logits}.float()
used = time.perf_counter() - start
print(json.dumps({{"open_s": opened, "first_logits_s": used, "base_kib": base, "open_kib": opened_kib,
                  "peak_kib": peak_kib(), "logits": logits[0, -1, :256].tolist()}}))
"""
"""On Linux `ru_maxrss` would hold the parent's peak too: it outlives exec."""
_CONTENDERS = {
    "tinylab": _MEASURE.format(
        imports="from tinylab.catalog.reference import load_model",
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


LIMIT = 0.05
"""Largest difference of logits that counts as bf16's rounding, relative to the largest logit."""


def bench_opening(preset: str | Model = "tinyllama_1b", windows: int = 5) -> dict[str, Any]:
    """Seconds and peak memory to open a bf16 Hugging Face folder of `preset`'s shape, ours and theirs in turn.

    Weights are random. Both libraries map files and read no page when they open them, so the first logits (8 tokens)
    are measured too: by then every weight has been read. Peak memory is the maximum resident set of the process (pages
    of the file included). `ratio_*` are medians of tinylab over transformers. One round of each is left out as
    warm-up of the page cache. Raises TinylabError if the logits differ by more than rounding, ConfigError for no
    windows.
    """
    config = shape_of(preset, windows)
    with tempfile.TemporaryDirectory(prefix="tinylab-bench-") as folder:
        model = Llama.empty(config, "cpu", torch.bfloat16)
        model.init_weights(0)
        save_weights(model.state_dict(), config, folder)
        write_config(config, folder, bos_id=1, eos_id=2, dtype="bfloat16")
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
        del model
        contenders = {name: partial(_measure, code, folder) for name, code in _CONTENDERS.items()}
        rounds = in_turn(contenders, windows + 1)
    logits = {name: torch.tensor([r.pop("logits") for r in measured]) for name, measured in rounds.items()}
    difference = (logits["tinylab"] - logits["transformers"]).abs().max().item()
    largest = logits["transformers"].abs().max().item()
    if not difference <= LIMIT * largest:
        raise TinylabError(
            f"both must open the same model; their logits differ by {difference:.3g} at a largest logit of "
            f"{largest:.3g}. Run the parity tests"
        )
    medians = {
        name: {key: statistics.median(r[key] for r in measured[1:]) for key in measured[0]}
        for name, measured in rounds.items()
    }
    ours, theirs = medians["tinylab"], medians["transformers"]
    keys = ("open_s", "first_logits_s", "open_kib", "peak_kib")
    ratios = {f"ratio_{key}": round(ours[key] / theirs[key], 3) for key in keys}
    return {
        "bench": "opening",
        "against": f"transformers {metadata.version('transformers')} LlamaForCausalLM.from_pretrained",
        "parameters": parameter_counts(config)["total"],
        "bytes": size,
        "windows": windows,
        **ratios,
        "medians": medians,
        "rounds": rounds,
        "max_logit_difference": difference,
        "largest_logit": largest,
        **conditions(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _measure(code: str, folder: str) -> dict[str, Any]:
    """One contender in a fresh interpreter. Raises TinylabError with its last words when it fails."""
    command = [sys.executable, "-W", "ignore", "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TinylabError(f"a contender must open {folder}; it failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
