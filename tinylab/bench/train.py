"""Training speed beside transformers' LlamaForCausalLM: same weights, tokens, optimizer and clipping, interleaved."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tinylab.bench.sides import conditions, in_turn
from tinylab.checkpoint.state import TrainState, build_state
from tinylab.config.architecture import Model
from tinylab.config.presets import preset as find_preset
from tinylab.config.schema import RunConfig
from tinylab.dist.context import Context, open_context
from tinylab.errors import ConfigError, TinylabError
from tinylab.model.accounting import flops_per_token, parameter_counts
from tinylab.model.attention import BACKENDS
from tinylab.model.attention_choice import choose_attention, wait_for
from tinylab.model.loss import MicroBatch
from tinylab.model.names import to_huggingface
from tinylab.model.precision import PRECISIONS, Precision, resolve_precision
from tinylab.model.transformer import Llama
from tinylab.runs.provenance import processor
from tinylab.training.step import train_step

FP32_LIMIT = 1e-4
"""Largest difference of logits in fp32 with which two models count as the same (sums in another order)."""


def bench_train(
    preset: str | RunConfig = "tiny",
    against: str = "transformers",
    windows: int = 5,
    *,
    device: str = "cpu",
    steps_per_window: int = 3,
) -> dict[str, Any]:
    """Tokens/s of whole optimizer steps, ours and the peer's in turn in one process, as a JSON-able record.

    A step is forward, backward, clipping and fused AdamW over one global batch of the preset's first stage. Four
    contenders: `tinylab` as the trainer runs by default (precision auto, no compile), `transformers` in fp32, and
    both again in the other's precision. Logits of both models are compared first. `ratio` is the median of `tinylab`
    over that of `transformers` fp32, `ratio_best` the same of the best windows. Left out as warm-up: the first two
    steps of each. Raises ConfigError for an unknown peer, TinylabError if the models differ.
    """
    if against != "transformers":
        raise ConfigError(f"against must be transformers; found {against!r}")
    if windows < 1 or steps_per_window < 1:
        raise ConfigError(f"windows and steps_per_window must be at least 1; found {windows} and {steps_per_window}")
    config = find_preset(preset) if isinstance(preset, str) else preset
    if device != "auto":
        config = replace(config, parallel=replace(config.parallel, device="cuda" if device == "cuda" else "cpu"))
    with open_context(config.parallel) as context:
        batches = random_batches(config, context.device)
        same = build_state(config, context, None).model
        difference = _logit_difference(same, batches[0])
        fp32, bf16 = (PRECISIONS[name](context.device) for name in ("fp32", "bf16"))
        default, other = (bf16, fp32) if resolve_precision(context.device, "auto") == bf16 else (fp32, bf16)

        def ours(precision: Precision) -> Callable[[], object]:
            return our_step(build_state(config, context, None), config, batches, precision, context)

        contenders: dict[str, tuple[Precision, Callable[[], object]]] = {
            "tinylab": (default, ours(default)),
            "transformers": (fp32, _peer_step(config, same, batches, fp32)),
            f"tinylab {other.name}": (other, ours(other)),
            "transformers bf16": (bf16, _peer_step(config, same, batches, bf16)),
        }
        batch_tokens = config.stages[0].batch_tokens

        def speed(step: Callable[[], object], steps: int = steps_per_window) -> float:
            wait_for(context.device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            wait_for(context.device)
            return round(steps * batch_tokens / (time.perf_counter() - start), 1)

        for _, step in contenders.values():
            speed(step, 2)
        speeds = in_turn({name: partial(speed, step) for name, (_, step) in contenders.items()}, windows)
        rows = {
            name: {"precision": contenders[name][0].name, "median": statistics.median(v), "best": max(v), "windows": v}
            for name, v in speeds.items()
        }
        return {
            "bench": "train",
            "against": f"transformers {__import__('transformers').__version__} LlamaForCausalLM, sdpa, eager",
            "preset": config.preset,
            "parameters": parameter_counts(config.model)["total"],
            "flops_per_token": flops_per_token(config.model),
            "formula": "F",
            "seq_len": config.model.seq_len,
            "batch_tokens": batch_tokens,
            "micro_batch": batches[0].inputs.shape[0],
            "clip_norm": config.optimizer.clip_norm,
            "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else processor(),
            **conditions(),
            "compile": False,
            "warmup_steps": 2,
            "steps_per_window": steps_per_window,
            "tokens_per_s": rows,
            "product_gflops": _product_ceiling(config.model, context.device),
            "max_logit_difference": difference,
            **_ratios(rows, default.name, other.name),
        }


def _ratios(rows: dict[str, dict[str, Any]], default: str, other: str) -> dict[str, float]:
    """Ours over the peer's: as both run by default, and at equal precision."""
    names = {default: "tinylab", other: f"tinylab {other}"}
    pairs = {"ratio": ("tinylab", "transformers")}
    for precision, peer in (("fp32", "transformers"), ("bf16", "transformers bf16")):
        pairs[f"ratio_{precision}"] = (names[precision], peer)
    kinds = (("", "median"), ("_best", "best"))
    return {k + s: round(rows[a][key] / rows[b][key], 3) for s, key in kinds for k, (a, b) in pairs.items()}


def random_batches(config: RunConfig, device: torch.device) -> list[MicroBatch]:
    """The micro-batches of one step: ids drawn once with the Zipf distribution of words in a text."""
    T, V = config.model.seq_len, config.model.vocab_size
    sequences = config.stages[0].batch_tokens // T
    weights = 1 / np.arange(1, V + 1)
    ids = np.random.default_rng(0).choice(V, size=(sequences, T + 1), p=weights / weights.sum())
    rows = torch.from_numpy(ids).to(device).split(config.parallel.micro_batch)
    return [MicroBatch(r[:, :-1].contiguous(), r[:, 1:].contiguous(), None) for r in rows]


def our_step(
    state: TrainState, config: RunConfig, batches: list[MicroBatch], precision: Precision, context: Context
) -> Callable[[], object]:
    """One step of the trainer itself, with the attention backend that it would choose."""
    state.model.attention = BACKENDS[
        choose_attention(config.model, config.parallel, context.device, precision.dtype)[0]
    ]
    targets, settings = sum(b.targets.numel() for b in batches), config.optimizer
    rate = {"lr": settings.lr, "clip_norm": settings.clip_norm}
    return partial(train_step, state, batches, targets, **rate, precision=precision, context=context)


def _peer(ours: Llama) -> Any:
    """transformers' model with our weights, attention through torch's SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinylab.formats.huggingface_config import config_values

    values = {k: v for k, v in config_values(ours.config).items() if v is not None}
    model = LlamaForCausalLM(LlamaConfig(**(values | {"use_cache": False, "attn_implementation": "sdpa"})))
    model.load_state_dict(to_huggingface(ours.state_dict(), ours.config), strict=not ours.config.tie_embeddings)
    return nn.Module.to(model.train(), ours.embed.weight.device)


def _peer_step(config: RunConfig, ours: Llama, batches: list[MicroBatch], precision: Precision) -> Callable[[], None]:
    """The same step as one would write it with transformers: sums over micro-batches, clipping, fused AdamW."""
    model, settings = _peer(ours), config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            with precision.step():
                loss = model(input_ids=batch.inputs, labels=batch.targets, shift_labels=batch.targets).loss
            (loss / len(batches)).backward()
            total += loss.item()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()

    return step


@torch.no_grad()
def _logit_difference(ours: Llama, batch: MicroBatch) -> float:
    """Largest absolute difference of logits in fp32. Raises TinylabError when the models are not the same."""
    ids = batch.inputs[:2]
    difference = (ours(ids) - _peer(ours)(input_ids=ids).logits).abs().max().item()
    if not difference < FP32_LIMIT:
        raise TinylabError(
            f"both models must give equal logits before their speed is compared (within {FP32_LIMIT} in fp32); "
            f"found a difference of {difference:.3g}. Run the parity tests"
        )
    return difference


def _product_ceiling(config: Model, device: torch.device) -> dict[str, float]:
    """GFLOP/s of the model's largest product, (4096, C) by (C, 2F) on random values: the best of ten."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(4096, config.d_model, device=device).to(dtype)
        b = torch.randn(config.d_model, 2 * config.d_ff, device=device).to(dtype)
        times = []
        for _ in range(10):
            wait_for(device)
            start = time.perf_counter()
            torch.mm(a, b)
            wait_for(device)
            times.append(time.perf_counter() - start)
        found[name] = round(2 * a.numel() * b.shape[1] / min(times) / 1e9, 1)
    return found
