"""What a run is: frozen, keyword-only dataclasses that check every relation between their fields.

Counts are in tokens unless a name says otherwise; "global" quantities are sums over all ranks.
Everything below is plain data: `io.py` writes it as TOML and reads it back.
"""

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from tinylab.config.architecture import Model, require_positive
from tinylab.config.faults import Faults
from tinylab.config.stages import Schedule, Stage
from tinylab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named source of documents and the cap on what is taken from it."""

    name: str
    """Name used in mixtures, shards and metrics."""
    corpus: str
    """`local:prose`, `local:code`, `files:GLOB` or `hf:NAME[:CONFIG]` (data/corpus/sources.py)."""
    limit_mb: float | None = None
    """Take at most this many megabytes (10^6 bytes of UTF-8 text); absent: everything."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"data.sources.name must be an identifier; found {self.name!r}")
        if self.corpus.partition(":")[0] not in ("local", "files", "hf"):
            raise ConfigError(
                f"data.sources.corpus must begin with local:, files: or hf:; found {self.corpus!r} (source {self.name})"
            )
        require_positive(f"data.sources.{self.name}", self, "limit_mb")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from: sources, tokenizer, boundaries, validation split."""

    sources: tuple[Source, ...] = (
        Source(name="prose", corpus="local:prose"),
        Source(name="code", corpus="local:code"),
    )
    """Named sources; a stage's mixture gives their shares."""
    path: str | None = None
    """Folder of prepared shards; absent: TINYLAB_HOME/data/<digest of this section>."""
    tokenizer: str = "train"
    """`train` a Llama-style BPE on the sources, or a folder or file that holds a tokenizer."""
    vocab_size: int = 4096
    """Entries of a trained tokenizer; a given tokenizer must have exactly this many."""
    boundary: Literal["eos", "bos", "bos_eos"] = "eos"
    """Ids set around each document: `eos` after it (TinyLlama), `bos` before it, or both."""
    validation_fraction: float = 0.01
    """Share of documents (by hash of their text) held out of training."""
    document_mask: bool = False
    """Whether attention stays inside a document and the loss skips its boundary."""
    seed: int = 1234
    """Key of the validation split and of the order of documents in the shards."""

    def __post_init__(self) -> None:
        require_positive("data", self, "vocab_size")
        if not self.sources:
            raise ConfigError("data.sources must name at least one source; found none")
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"data.sources must have different names; found twice: {', '.join(twice)}")
        if not 0 < self.validation_fraction < 0.5:
            raise ConfigError(
                f"data.validation_fraction must lie between 0 and 0.5 (both excluded); found {self.validation_fraction}"
            )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(s.name for s in self.sources)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Defaults are TinyLlama's (jzhang38/TinyLlama:pretrain/tinyllama.py) but for `decay` and `clip_norm`."""

    kind: Literal["adamw"] = "adamw"
    """A kind that tinylab.optim.build knows."""
    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the decayed group."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay: `matrices` spares norms and embedding; `all` is TinyLlama's original."""
    clip_norm: float | None = None
    """Gradients are scaled down to this global norm; absent: no clipping. TinyLlama: 1.0."""

    def __post_init__(self) -> None:
        require_positive("optimizer", self, "lr eps")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optimizer.betas must lie in [0, 1); found {self.betas}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"optimizer.weight_decay must be finite and at least 0; found {self.weight_decay}")
        require_positive("optimizer", self, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the work of one step is laid out on devices; nothing here changes which samples a step has."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where it works."""
    micro_batch: int = 8
    """Sequences per forward pass on one rank; fewer where a rank's share of the batch is smaller."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` is autocast over fp32 weights; `auto` takes it where the device computes in it natively."""
    attention: Literal["auto", "torch", "cudnn", "flash", "efficient", "math", "flash-attn", "xformers", "flex"] = (
        "auto"
    )
    """Backend of attention (model/attention.py): `torch` is its own choice among its kernels; `auto` takes the fastest
    on the run's shapes on CUDA, and torch's choice elsewhere."""
    compile: bool = False
    """Whether torch.compile is used; pays back after a few hundred steps."""
    threads: int | None = None
    """CPU threads per rank; absent: the machine's cores over its ranks. Changes the last bits of weights."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """Several ranks: `ddp` replicates, `fsdp` shards (FSDP2), `hsdp` shards inside a machine and replicates across
    machines; `auto`: ddp on the CPU, fsdp on the GPUs of one machine, hsdp on those of several."""
    reduction: Literal["fast", "canonical"] = "fast"
    """How gradients are summed. `canonical`: weights have the same bits on any number of ranks that divides the batch,
    at the price of one sequence per forward pass (dist/canonical.py); threads then default to 1 on the CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: what the backward pass computes again instead of keeping it in memory. `selective`
    keeps the results of matrix products and attention, `full` only the input of each block. Results are the same."""
    timeout_s: float = 300.0
    """How long ranks that exchange something wait for one that is dead or stuck, once training has begun."""

    def __post_init__(self) -> None:
        require_positive("parallel", self, "micro_batch timeout_s threads")


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are committed, and which are kept."""

    every_tokens: int = 10_000_000_000
    """Tokens between checkpoints; always one at the end of each stage and of the run."""
    early: bool = True
    """Also at steps 1, 2, 4, 8, … below the first regular one, where learning is fastest."""
    keep: int | None = None
    """Newest regular checkpoints to keep, counting verified ones only; early and stage-end ones stay. Absent: all."""
    on_error: Literal["stop", "continue"] = "stop"
    """What follows a checkpoint that could not be written, after the repeats: the run stops, or it continues and the
    next checkpoint is tried at its time. The run's last one must succeed."""

    def __post_init__(self) -> None:
        require_positive("saving", self, "every_tokens")
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"saving.keep must be at least 1, or absent to keep all; found {self.keep}")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on held-out documents."""

    every_tokens: int = 10_000_000_000
    """Tokens between measurements; also after the first step and after the last one."""
    sequences: int = 800
    """Validation sequences per measurement, always the same; fewer if the split has fewer."""

    def __post_init__(self) -> None:
        require_positive("validation", self, "every_tokens sequences")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `config.toml` of a run folder is exactly this."""

    preset: str = "custom"
    """Name of the preset that this configuration started from."""
    seed: int = 3407
    """Key of the weights' initialization and of the order of samples (TinyLlama: 3407)."""
    model: Model = field(default_factory=Model)
    data: Data = Data()
    stages: tuple[Stage, ...] = (Stage(),)
    """Stretches of the run, in order."""
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    saving: Saving = Saving()
    validation: Validation = Validation()
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie between 0 and 2^63 - 1; found {self.seed}")
        if self.model.vocab_size != self.data.vocab_size:
            raise ConfigError(
                f"model.vocab_size ({self.model.vocab_size}) must equal data.vocab_size ({self.data.vocab_size}); "
                "set both to the tokenizer's number of entries"
            )
        if not self.stages:
            raise ConfigError("stages must hold at least one stage; found none")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages must have different names; found {', '.join(names)}")
        seq_len = self.model.seq_len
        for stage in self.stages:
            if stage.batch_tokens % seq_len:
                low = max(stage.batch_tokens // seq_len, 1) * seq_len
                raise ConfigError(
                    f"stages.{stage.name}.batch_tokens ({stage.batch_tokens}) must be a multiple of model.seq_len "
                    f"({seq_len}); nearest valid: {low} or {low + seq_len}"
                )
            unknown = sorted(set(stage.mixture) - set(self.data.source_names))
            if unknown:
                raise ConfigError(
                    f"stages.{stage.name}.mixture names unknown sources: {', '.join(unknown)}; "
                    f"data.sources has {', '.join(self.data.source_names)}"
                )
        if self.schedule.kind != "constant" and self.schedule.warmup_tokens >= self.tokens:
            raise ConfigError(
                f"schedule.warmup_tokens ({self.schedule.warmup_tokens}) must be less than the run's tokens "
                f"({self.tokens}); shorten the warm-up or lengthen the run"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(s.steps for s in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, over all ranks: every stage in whole steps."""
        return sum(s.steps * s.batch_tokens for s in self.stages)

    def stage_bounds(self) -> tuple[tuple[int, int], ...]:
        """(first step, last step) of each stage; steps count from 1."""
        ends = accumulate(s.steps for s in self.stages)
        return tuple((end - s.steps + 1, end) for s, end in zip(self.stages, ends, strict=True))

    def stage_index(self, step: int) -> int:
        """Index of the stage that step `step` (from 1) belongs to. Raises ConfigError outside the run."""
        for i, (first, last) in enumerate(self.stage_bounds()):
            if first <= step <= last:
                return i
        raise ConfigError(f"step must lie between 1 and {self.steps}, the length of the run; found {step}")

    def tokens_at(self, step: int) -> int:
        """Tokens consumed after step `step`; 0 for step 0."""
        bounds = zip(self.stages, self.stage_bounds(), strict=True)
        return sum(max(0, min(step, last) - first + 1) * s.batch_tokens for s, (first, last) in bounds)

    def mixture(self, index: int) -> dict[str, float]:
        """Shares of every source in stage `index` after its ramp, summing to 1; equal shares if none are given."""
        given = self.stages[index].mixture or dict.fromkeys(self.data.source_names, 1.0)
        total = sum(given.values())
        return {n: given.get(n, 0.0) / total for n in self.data.source_names}
