"""Presets: functions that return a whole run. A variant is `replace(base(), …)`; nothing repeats a default."""

from collections.abc import Callable
from dataclasses import replace

from tinylab.config.architecture import Model
from tinylab.config.schema import Data, Optimizer, Parallel, RunConfig, Saving, Source, Validation
from tinylab.config.stages import STEP_TOKENS, Schedule, Stage
from tinylab.errors import ConfigError, did_you_mean

SLIMPAJAMA = Source(name="slimpajama", corpus="hf:cerebras/SlimPajama-627B")
STARCODER = Source(name="starcoder", corpus="hf:bigcode/starcoderdata")


def tinyllama_1b() -> RunConfig:
    """TinyLlama v1.0: 3T tokens, one stage, one cosine (jzhang38/TinyLlama:pretrain/tinyllama.py).

    Deviations on purpose: weight decay spares norms and embedding (`optimizer.decay = "all"` restores it),
    the schedule is a function of tokens, and the order of samples is this project's.
    """
    return RunConfig(
        preset="tinyllama_1b",
        data=Data(sources=(SLIMPAJAMA, STARCODER), tokenizer="TinyLlama/TinyLlama_v1.1", vocab_size=32_000),
        stages=(Stage(mixture={"slimpajama": 0.693584, "starcoder": 0.306416}),),
        optimizer=Optimizer(clip_norm=1.0),
        saving=Saving(every_tokens=5000 * STEP_TOKENS),
        validation=Validation(every_tokens=5000 * STEP_TOKENS),
    )


def tinyllama_v1_1() -> RunConfig:
    """TinyLlama v1.1: 2T tokens in three stages under one cosine; the batch grows fourfold in the cooldown.

    From the model card of TinyLlama/TinyLlama_v1.1. Assumed, because never published: the exact batch
    sizes (880 and 3,520 sequences round to the printed 1.8M and 7.2M) and the rates (v1.0's).
    """
    base, slimpajama = tinyllama_1b(), {"slimpajama": 1.0}
    small, large = 880 * 2048, 3520 * 2048
    return replace(
        base,
        preset="tinyllama_v1_1",
        data=replace(base.data, sources=(SLIMPAJAMA,)),
        stages=(
            Stage(name="basic", tokens=1_500_000_000_000, batch_tokens=small, mixture=slimpajama),
            Stage(name="continual", tokens=350_000_000_000, batch_tokens=small, mixture=slimpajama),
            Stage(name="cooldown", tokens=150_000_000_000, batch_tokens=large, mixture=slimpajama),
        ),
        schedule=Schedule(warmup_tokens=2000 * small),
    )


def tinyllama_120m() -> RunConfig:
    """`tiny_LLaMA_120M` of TinyLlama: 121,129,728 parameters, multi-query attention; 100 tokens per parameter."""
    base = tinyllama_1b()
    return replace(
        base,
        preset="tinyllama_120m",
        model=replace(base.model, n_layer=12, d_model=768, n_head=12, n_kv_head=1, d_ff=2048),
        stages=(replace(base.stages[0], tokens=12_000_000_000, batch_tokens=524_288),),
        schedule=Schedule(warmup_tokens=100_000_000),
        saving=Saving(every_tokens=500_000_000),
        validation=Validation(every_tokens=500_000_000),
    )


def tiny() -> RunConfig:
    """A few million parameters on 20 MB of this Python environment's own text: minutes on two CPU cores."""
    return RunConfig(
        preset="tiny",
        data=Data(
            sources=(
                Source(name="prose", corpus="local:prose", limit_mb=12.0),
                Source(name="code", corpus="local:code", limit_mb=8.0),
            ),
            validation_fraction=0.03,  # the probes come from it, and 1% held four source files
        ),
        model=Model(vocab_size=4096, n_layer=4, d_model=192, n_head=6, n_kv_head=2, d_ff=512, seq_len=256),
        stages=(Stage(tokens=2_097_152, batch_tokens=4096, mixture={"prose": 0.7, "code": 0.3}),),
        schedule=Schedule(warmup_tokens=80_000),
        optimizer=Optimizer(lr=3e-3, clip_norm=1.0),
        parallel=Parallel(micro_batch=16),
        saving=Saving(every_tokens=500_000),
        validation=Validation(every_tokens=250_000, sequences=64),
    )


def demo() -> RunConfig:
    """`tinylab demo`: two stages, prose then a cooldown with a ramp towards code, like TinyLlama v1.1's last ones."""
    base = tiny()
    return replace(
        base,
        preset="demo",
        stages=(
            Stage(name="basic", tokens=1_499_136, batch_tokens=4096, mixture={"prose": 0.7, "code": 0.3}),
            Stage(
                name="cooldown",
                tokens=507_904,
                batch_tokens=8192,
                mixture={"prose": 0.5, "code": 0.5},
                ramp_tokens=81_920,
            ),
        ),
        saving=Saving(every_tokens=374_784),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    f.__name__: f for f in (tiny, demo, tinyllama_120m, tinyllama_1b, tinyllama_v1_1)
}


def preset(name: str, tokens: int | None = None) -> RunConfig:
    """The preset called `name` (`-` and `.` count as `_`), its stages and warm-up scaled to `tokens` if given.

    Raises ConfigError with the nearest name when there is no such preset.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    key = {"tinyllama_1_1b": "tinyllama_1b"}.get(key, key)
    if key not in PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(PRESETS)}; found {name!r}. {did_you_mean(key, PRESETS)}".strip()
        )
    run = PRESETS[key]()
    return run if tokens is None else scale_tokens(run, tokens)


def scale_tokens(run: RunConfig, tokens: int) -> RunConfig:
    """The run with its stages, ramps and warm-up scaled so that it lasts `tokens` (rounded up to whole steps)."""
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1; found {tokens}")
    total = sum(s.tokens for s in run.stages)
    stages = []
    for stage in run.stages:
        length = max(1, round(stage.tokens * tokens / total))
        stages.append(replace(stage, tokens=length, ramp_tokens=min(length, stage.ramp_tokens * tokens // total)))
    warmup = min(run.schedule.warmup_tokens, run.schedule.warmup_tokens * tokens // total)
    return replace(run, stages=tuple(stages), schedule=replace(run.schedule, warmup_tokens=warmup))
