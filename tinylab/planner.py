"""What a run will need, before it starts: memory, steps, days, cost (no torch)."""

import math
from dataclasses import dataclass, replace

from tinylab.config.architecture import nearest_divisor
from tinylab.config.presets import preset, scale_tokens, tinyllama_1b
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError
from tinylab.model.accounting import FORMULAS, flops_per_token, memory_bytes, parameter_counts
from tinylab.model.devices import Gpu, gpu_named
from tinylab.optim.schedule import check_schedule, lr_at

TINYLLAMA_TOKENS_PER_S = 24_000
"""Tokens/s of one A100-40G in TinyLlama's own run (jzhang38/TinyLlama:README.md)."""
ASSUMED_MFU = TINYLLAMA_TOKENS_PER_S * flops_per_token(tinyllama_1b().model) / 312e12
"""56.3%: that speed as a share of an A100's peak by formula F; assumed if neither a speed nor an MFU is given."""
MEMORY_SHARE = 0.95
"""Share of a GPU's memory that the estimate may fill; the rest is for the CUDA context and fragments."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage's batches: the same global batch at any number of GPUs."""

    name: str
    tokens: int
    steps: int
    batch_tokens: int
    sequences: int
    """Sequences of an optimizer step over all GPUs."""
    sequences_per_gpu: int
    micro_batch: int
    """Sequences of one forward pass on one GPU."""
    accumulation: int
    """Forward and backward passes per optimizer step."""
    lr_first: float
    lr_last: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer of `plan`; None is for what cannot be known. Bytes are per GPU, tokens and steps global."""

    preset: str
    gpu: str
    gpus: int
    parameters: dict[str, int]
    flops_per_token: int
    """By formula F, as is the MFU here and in metrics."""
    flops_by_formula: dict[str, int]
    tokens: int
    steps: int
    batch: tuple[StagePlan, ...]
    """The composition of one optimizer step, for each stage."""
    total_flops: int
    """By formula F."""
    memory_bytes: dict[str, int]
    gpu_memory_bytes: int
    fits: bool
    checkpoint_bytes: int
    """Weights and both moments in fp32: one checkpoint on disk."""
    tokens_per_s_per_gpu: float | None
    tokens_per_s: float | None
    mfu: float | None
    days: float | None
    gpu_hours: float | None
    cost: float | None
    """gpu_hours times the price, in the price's currency."""
    basis: str
    """Where the speed comes from."""
    notes: tuple[str, ...]
    """Problems and doubts."""

    def text(self) -> str:
        """The plan as lines for a terminal."""
        memory = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in self.memory_bytes.items() if k != "total")
        lines = [
            f"{self.preset} on {self.gpus} × {self.gpu}",
            f"parameters      {self.parameters['total']:,} ({self.parameters['matmul']:,} in matrix products)",
            f"FLOPs per token {self.flops_per_token:,} by formula F ({FORMULAS['F'].partition(':')[0]})",
            f"tokens          {self.tokens:,} in {self.steps:,} steps, {self.total_flops:.3g} FLOPs",
            *(
                f"  {s.name}: {s.steps:,} steps of {s.batch_tokens:,} tokens = {s.sequences} sequences: "
                f"{s.sequences_per_gpu} per GPU, {s.accumulation} × {s.micro_batch}; "
                f"learning rate {s.lr_first:.3g} to {s.lr_last:.3g}"
                for s in self.batch
            ),
            f"memory per GPU  {self.memory_bytes['total'] / 1e9:.1f} of {self.gpu_memory_bytes / 1e9:.0f} GB",
            f"  {memory}",
            f"checkpoint      {self.checkpoint_bytes / 1e9:.1f} GB",
            f"speed           {_shown(self.tokens_per_s_per_gpu, ',.0f')} tokens/s per GPU, "
            f"{_shown(self.tokens_per_s, ',.0f')} in all, MFU (F) {_shown(self.mfu, '.1%')}: {self.basis}",
            f"time            {_shown(self.days, ',.1f')} days, {_shown(self.gpu_hours, ',.0f')} GPU-hours, "
            f"cost {_shown(self.cost, ',.0f')}",
            *(f"note: {n}" for n in self.notes),
        ]
        return "\n".join(lines)


def plan(
    run: str | RunConfig = "tinyllama_1b",
    gpu: str = "a100-40g",
    gpus: int = 16,
    tokens: int | None = None,
    tokens_per_s: float | None = None,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
    micro_batch: int | None = None,
) -> Plan:
    """What a run (a preset's name or a configuration) needs on `gpus` GPUs of one kind.

    `tokens` scales the run's stages; `micro_batch` replaces the configured one. The speed is `tokens_per_s` (of one
    GPU, ideally measured), else `mfu` (by formula F) of the peak, else TinyLlama's own 56.3% of it. Raises ConfigError
    for an unknown preset or GPU, a batch that does not divide, or a decay that does not decay.
    """
    config = preset(run, tokens) if isinstance(run, str) else (run if tokens is None else scale_tokens(run, tokens))
    if micro_batch is not None:
        config = replace(config, parallel=replace(config.parallel, micro_batch=micro_batch))
    device = gpu_named(gpu)
    _check(gpus, tokens_per_s, mfu, price_per_gpu_hour)
    check_schedule(config)
    F = flops_per_token(config.model)
    speed, basis = _speed(device, F, tokens_per_s, mfu)
    memory = memory_bytes(config, gpus=gpus)
    capacity = int(device.memory_gb * 1e9)
    fits = memory["total"] <= MEMORY_SHARE * capacity
    seconds = None if speed is None else config.tokens / (speed * gpus)
    hours = None if seconds is None else seconds / 3600 * gpus
    counts = parameter_counts(config.model)
    return Plan(
        preset=config.preset,
        gpu=device.name,
        gpus=gpus,
        parameters=counts,
        flops_per_token=F,
        flops_by_formula={name: flops_per_token(config.model, formula=name) for name in FORMULAS},
        tokens=config.tokens,
        steps=config.steps,
        batch=tuple(_stage(config, i, gpus) for i in range(len(config.stages))),
        total_flops=F * config.tokens,
        memory_bytes=memory,
        gpu_memory_bytes=capacity,
        fits=fits,
        checkpoint_bytes=12 * counts["total"],
        tokens_per_s_per_gpu=speed,
        tokens_per_s=None if speed is None else speed * gpus,
        mfu=None if speed is None or device.bf16_tflops is None else speed * F / (device.bf16_tflops * 1e12),
        days=None if seconds is None else seconds / 86400,
        gpu_hours=hours,
        cost=None if hours is None or price_per_gpu_hour is None else hours * price_per_gpu_hour,
        basis=basis,
        notes=tuple(_notes(config, device, memory["total"], fits, speed, F)),
    )


def _check(gpus: int, tokens_per_s: float | None, mfu: float | None, price: float | None) -> None:
    both = tokens_per_s is not None and mfu is not None
    rules = {
        f"gpus must be at least 1; found {gpus}": gpus >= 1,
        "give tokens_per_s or mfu, not both; each follows from the other": not both,
        f"tokens_per_s must be finite and greater than 0; found {tokens_per_s}": tokens_per_s is None
        or 0 < tokens_per_s < math.inf,
        f"mfu must be greater than 0 and at most 1; found {mfu}": mfu is None or 0 < mfu <= 1,
        f"price_per_gpu_hour must be finite and at least 0; found {price}": price is None or 0 <= price < math.inf,
    }
    problems = [rule for rule, holds in rules.items() if not holds]
    if problems:
        raise ConfigError("; ".join(problems))


def _speed(device: Gpu, flops: int, tokens_per_s: float | None, mfu: float | None) -> tuple[float | None, str]:
    if tokens_per_s is not None:
        return float(tokens_per_s), "as given"
    if device.bf16_tflops is None:
        return None, f"unknown, because {device.name} has no bf16, hence no bf16 peak; give tokens_per_s"
    basis = f"MFU of {mfu or ASSUMED_MFU:.1%} by formula F"
    tinyllamas = f"assumed {basis}, TinyLlama's own 24,000 tokens/s on an A100; a measurement is better"
    return (mfu or ASSUMED_MFU) * device.bf16_tflops * 1e12 / flops, f"{basis} as given" if mfu else tinyllamas


def _stage(config: RunConfig, index: int, gpus: int) -> StagePlan:
    """The batches of one stage. Raises ConfigError when its sequences do not divide over the GPUs."""
    stage, (first, last) = config.stages[index], config.stage_bounds()[index]
    sequences = stage.batch_tokens // config.model.seq_len
    if sequences % gpus:
        raise ConfigError(
            f"gpus ({gpus}) must divide the {sequences} sequences of a step of stage {stage.name} "
            f"(batch_tokens {stage.batch_tokens} / seq_len {config.model.seq_len}); "
            f"nearest valid: {nearest_divisor(sequences, gpus)}"
        )
    per_gpu = sequences // gpus
    micro_batch = min(config.parallel.micro_batch, per_gpu)
    return StagePlan(
        name=stage.name,
        tokens=stage.steps * stage.batch_tokens,
        steps=stage.steps,
        batch_tokens=stage.batch_tokens,
        sequences=sequences,
        sequences_per_gpu=per_gpu,
        micro_batch=micro_batch,
        accumulation=-(-per_gpu // micro_batch),
        lr_first=lr_at(config, first),
        lr_last=lr_at(config, last),
    )


def _notes(config: RunConfig, device: Gpu, needed: int, fits: bool, speed: float | None, flops: int) -> list[str]:
    found = []
    if not fits:
        found.append(
            f"an estimated {needed / 1e9:.1f} GB must fit into {MEMORY_SHARE:.0%} of {device.memory_gb:.0f} GB; "
            f"lower parallel.micro_batch ({config.parallel.micro_batch}) or take more GPUs"
        )
    if device.bf16_tflops is None and config.parallel.precision == "bf16":
        found.append(f'{device.name} has no bf16; set parallel.precision = "fp32"')
    if speed is not None and device.bf16_tflops is not None and speed * flops > device.bf16_tflops * 1e12:
        found.append(f"{speed:,.0f} tokens/s is more than the peak of {device.name} allows by formula F")
    if config.schedule.kind == "constant" and all(s.lr in ("schedule", "constant") for s in config.stages):
        found.append("the learning rate never decays (schedule.kind = constant)")
    return found


def _shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
