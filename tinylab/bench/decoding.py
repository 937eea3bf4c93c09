"""Greedy decoding with a key-value cache beside transformers' `generate`: same weights, same prompt, in turn."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.config.presets import preset as find_preset
from tinylab.errors import ConfigError, TinylabError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.load import load_folder
from tinylab.model.generate import generate_ids
from tinylab.model.transformer import Llama

PROMPT = 16
NEW = 64


def bench_decoding(preset: str | Model = "tiny", windows: int = 5) -> dict[str, Any]:
    """New tokens/s of greedy decoding on the CPU in fp32, one sequence, ours and transformers' in turn.

    A window is one call that takes a prompt of 16 ids and gives up to 64 more, prompt included in the time. Weights
    are random; no end token stops either. `ratio` is the median of tinylab over that of transformers. One call of
    each is left out as warm-up. Raises TinylabError if the tokens of a call differ, ConfigError for no windows or a
    model of fewer than 32 tokens.
    """
    config = find_preset(preset).model if isinstance(preset, str) else preset
    new = min(NEW, config.seq_len - PROMPT)
    if windows < 1 or new < PROMPT:
        raise ConfigError(
            f"windows must be at least 1, and seq_len at least {2 * PROMPT}; found {windows}, {config.seq_len}"
        )
    ours, theirs = _pair(config)
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)

    def their_ids() -> Tensor:
        return theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True)

    contenders = {"tinylab": lambda: generate_ids(ours, prompt, new), "transformers": their_ids}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    wanted = contenders["transformers"]()
    for window in range(windows + 1):
        for name, decode in contenders.items():
            start = time.perf_counter()
            found = decode()
            seconds = time.perf_counter() - start
            if not torch.equal(found, wanted):
                raise TinylabError(
                    f"both must give the same tokens before their speed is compared; found {found.tolist()} from "
                    f"{name} and {wanted.tolist()} from transformers. Run the parity tests"
                )
            if window:
                speeds[name].append(round(new / seconds, 1))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "bench": "decoding",
        "against": f"transformers {metadata.version('transformers')} generate, sdpa, with its cache",
        "parameters": sum(p.numel() for p in ours.parameters()),
        "prompt_tokens": PROMPT,
        "new_tokens": new,
        "ratio": round(medians["tinylab"] / medians["transformers"], 3),
        "tokens_per_s": {name: {"median": medians[name], "windows": values} for name, values in speeds.items()},
        "equal_tokens": True,
        "precision": "fp32",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def _pair(config: Model) -> tuple[Llama, Any]:
    """The same random weights in both libraries, fp32. Larger than at the start of training, so that tokens vary."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = Llama.empty(config, "cpu", torch.float32)
    model.init_weights(0)
    with tempfile.TemporaryDirectory(prefix="tinylab-bench-") as folder:
        with torch.no_grad():
            state = {name: w if w.ndim == 1 else 2 * w for name, w in model.state_dict().items()}
        save_weights(state, config, folder)
        write_config(config, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs: Any = load(folder, dtype=torch.float32).eval()
        ours = load_folder(folder)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return ours, theirs
