"""The shape of a Llama: a frozen, keyword-only dataclass that checks every relation between its fields."""

import math
from dataclasses import dataclass
from typing import Literal

from tinylab.errors import ConfigError


def require_positive(section: str, values: object, names: str) -> None:
    """Raise ConfigError naming each of the fields `names` of `values` that is no finite number above 0; None may be."""
    given = {name: getattr(values, name) for name in names.split()}
    bad = [f"{section}.{k} = {v!r}" for k, v in given.items() if v is not None and not (math.isfinite(v) and v > 0)]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: must be finite and greater than 0")


def nearest_divisor(of: int, near: int) -> int:
    """The divisor of `of` that lies closest to `near` (the larger of two equally close)."""
    near = min(near, of)
    tried = (d for far in range(min(near, 10**6)) for d in (near + far, near - far))
    return next((d for d in tried if of % d == 0), 1)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies changed for longer contexts, as in Hugging Face's `rope_scaling`."""

    rope_type: Literal["linear", "llama3"] = "llama3"
    """`linear` divides positions by `factor`; `llama3` scales by wavelength (Llama 3.1)."""
    factor: float = 8.0
    """Ratio of the new context to the old one."""
    low_freq_factor: float = 1.0
    """llama3 only: wavelengths above original_seq_len / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3 only: wavelengths below original_seq_len / this are kept."""
    original_seq_len: int = 8192
    """llama3 only: context of the model before scaling, in tokens."""

    def __post_init__(self) -> None:
        names = "factor low_freq_factor high_freq_factor original_seq_len"
        require_positive("model.rope_scaling", self, names)
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                "model.rope_scaling.high_freq_factor must exceed low_freq_factor; found "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a Llama-2 model. Defaults are TinyLlama-1.1B (jzhang38/TinyLlama:lit_gpt/config.py)."""

    vocab_size: int = 32_000
    """Entries of the tokenizer, and rows of embedding and head."""
    n_layer: int = 22
    """Transformer blocks."""
    d_model: int = 2048
    """Width of the residual stream."""
    n_head: int = 32
    """Query heads."""
    n_kv_head: int = 4
    """Key and value heads (grouped-query attention)."""
    d_ff: int = 5632
    """Width of the SwiGLU."""
    d_head: int | None = None
    """Size of one head; absent: d_model / n_head."""
    seq_len: int = 2048
    """Context in tokens: length of a training sequence, and the longest that is promised."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Absent: the plain rotary embedding of Llama 2."""
    tie_embeddings: bool = False
    """Whether embedding and head are one matrix."""
    init: Literal["tinyllama", "normal"] = "tinyllama"
    """`tinyllama`: std sqrt(2/(5 d)), and 1/(sqrt(d) L) for attention output and MLP down; `normal`: `init_std`."""
    init_std: float = 0.02
    """Standard deviation of `init = "normal"` (transformers' default)."""

    def __post_init__(self) -> None:
        sizes = "vocab_size n_layer d_model n_head n_kv_head d_ff d_head seq_len"
        require_positive("model", self, sizes + " norm_eps rope_theta init_std")
        if self.d_head is None and self.d_model % self.n_head:
            raise ConfigError(
                f"model.n_head ({self.n_head}) must divide model.d_model ({self.d_model}); "
                f"nearest valid: {nearest_divisor(self.d_model, self.n_head)}"
            )
        if self.n_head % self.n_kv_head:
            raise ConfigError(
                f"model.n_kv_head ({self.n_kv_head}) must divide model.n_head ({self.n_head}); "
                f"nearest valid: {nearest_divisor(self.n_head, self.n_kv_head)}"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"the head size must be even for rotary embeddings; found {self.head_size}: "
                "change model.d_head, model.d_model or model.n_head"
            )

    @property
    def head_size(self) -> int:
        """Size of one attention head (D)."""
        return self.d_head if self.d_head is not None else self.d_model // self.n_head
