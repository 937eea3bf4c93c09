"""Greedy decoding with a key-value cache beside transformers' `generate`: same weights, same prompt, in turn."""

import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tinylab.bench.sides import conditions, in_turn, open_in_both, shape_of
from tinylab.config.architecture import Model
from tinylab.errors import ConfigError, TinylabError
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
    config = shape_of(preset, windows)
    new = min(NEW, config.seq_len - PROMPT)
    if new < PROMPT:
        raise ConfigError(f"seq_len must be at least {2 * PROMPT}; found {config.seq_len}")
    model = Llama(config)
    model.init_weights(0)
    with torch.no_grad():  # larger than at the start of training, so that the tokens vary
        for weight in model.parameters():
            weight.mul_(1 if weight.ndim == 1 else 2)
    ours, theirs = open_in_both(model)
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)

    def their_ids() -> Tensor:
        return theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True)

    wanted = their_ids()

    def speed(decode: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        found = decode()
        seconds = time.perf_counter() - start
        if not torch.equal(found, wanted):
            raise TinylabError(
                f"both must give the same tokens before their speed is compared; found {found.tolist()} and "
                f"{wanted.tolist()} from transformers. Run the parity tests"
            )
        return round(new / seconds, 1)

    contenders = {"tinylab": lambda: speed(lambda: generate_ids(ours, prompt, new))}
    contenders["transformers"] = lambda: speed(their_ids)
    speeds = {name: values[1:] for name, values in in_turn(contenders, windows + 1).items()}
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
        **conditions(),
    }
