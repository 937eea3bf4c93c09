"""Training speed beside transformers' LlamaForCausalLM: same weights, tokens, optimizer and clipping, interleaved."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinylab.checkpoint.state import TrainState, build_state
from tinylab.config.architecture import Model
from tinylab.config.presets import preset as find_preset
from tinylab.config.schema import RunConfig
from tinylab.data.loader import MicroBatch
from tinylab.dist.context import Context, open_context
from tinylab.errors import ConfigError, TinylabError
from tinylab.model.accounting import flops_per_token, parameter_counts
from tinylab.model.attention import BACKENDS
from tinylab.model.attention_choice import choose_attention
from tinylab.model.names import to_huggingface
from tinylab.model.precision import PRECISIONS, Precision, resolve_precision
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
        difference = _logit_difference(config, batches[0], context)
        fp32, bf16 = (PRECISIONS[name](context.device) for name in ("fp32", "bf16"))
        default, other = (bf16, fp32) if resolve_precision(context.device, "auto") == bf16 else (fp32, bf16)

        def ours(precision: Precision) -> Callable[[], object]:
            return our_step(build_state(config, context, None), config, batches, precision, context)

        contenders: dict[str, tuple[Precision, Callable[[], object]]] = {
            "tinylab": (default, ours(default)),
            "transformers": (fp32, _peer_step(config, batches, fp32, context)),
            f"tinylab {other.name}": (
                other,
                our_step(build_state(config, context, None), config, batches, other, context),
            ),
            "transformers bf16": (bf16, _peer_step(config, batches, bf16, context)),
        }
        batch_tokens = config.stages[0].batch_tokens
        speeds = _measure({k: f for k, (_, f) in contenders.items()}, windows, steps_per_window, batch_tokens, context)
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
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
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


def _peer(config: Model, state: dict[str, Tensor], device: torch.device) -> Any:
    """transformers' model with our weights, attention through torch's SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinylab.formats.huggingface_config import config_values

    values = {k: v for k, v in config_values(config).items() if v is not None}
    model = LlamaForCausalLM(LlamaConfig(**(values | {"use_cache": False, "attn_implementation": "sdpa"})))
    model.load_state_dict(to_huggingface(state, config), strict=not config.tie_embeddings)
    model.train()
    return nn.Module.to(model, device)


def _peer_step(
    config: RunConfig, batches: list[MicroBatch], precision: Precision, context: Context
) -> Callable[[], None]:
    """The same step as one would write it with transformers: sums over micro-batches, clipping, fused AdamW."""
    model = _peer(config.model, build_state(config, context, None).model.state_dict(), context.device)
    settings = config.optimizer
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
def _logit_difference(config: RunConfig, batch: MicroBatch, context: Context) -> float:
    """Largest absolute difference of logits in fp32. Raises TinylabError when the models are not the same."""
    ours = build_state(config, context, None).model
    peer = _peer(config.model, ours.state_dict(), context.device)
    ids = batch.inputs[:2]
    difference = (ours(ids) - peer(input_ids=ids).logits).abs().max().item()
    if not difference < FP32_LIMIT:
        raise TinylabError(
            f"both models must give equal logits before their speed is compared (within {FP32_LIMIT} in fp32); "
            f"found a difference of {difference:.3g}. Run the parity tests"
        )
    return difference


def _measure(
    steps: dict[str, Callable[[], object]], windows: int, steps_per_window: int, batch_tokens: int, context: Context
) -> dict[str, list[float]]:
    """Tokens/s of every contender in every window, taken in turn."""
    for step in steps.values():
        step()
        step()
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(windows):
        for name, step in steps.items():
            _synchronize(context.device)
            start = time.perf_counter()
            for _ in range(steps_per_window):
                step()
            _synchronize(context.device)
            speeds[name].append(round(steps_per_window * batch_tokens / (time.perf_counter() - start), 1))
    return speeds


def _product_ceiling(config: Model, device: torch.device) -> dict[str, float]:
    """GFLOP/s of the model's largest product, (4096, C) by (C, 2F) on random values: the best of ten."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(4096, config.d_model, device=device).to(dtype)
        b = torch.randn(config.d_model, 2 * config.d_ff, device=device).to(dtype)
        times = []
        for _ in range(10):
            _synchronize(device)
            start = time.perf_counter()
            torch.mm(a, b)
            _synchronize(device)
            times.append(time.perf_counter() - start)
        found[name] = round(2 * a.numel() * b.shape[1] / min(times) / 1e9, 1)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
