"""Rotary position embedding, half-split as Hugging Face's Llama: feature i turns together with feature i + D/2.

Letters: B batch, T tokens, N heads of any kind, D head size.
"""

import math

import torch
from torch import Tensor

from tinylab.config.architecture import Model


def rope_frequencies(config: Model) -> Tensor:
    """Angle per position of each of the D/2 pairs, fp32 (D/2,).

    theta^(-2i/D) (Su et al. 2021); `linear` divides it by the factor; `llama3` divides long wavelengths, keeps
    short ones and blends in between (transformers:src/transformers/modeling_rope_utils.py).
    """
    size, scaling = config.head_size, config.rope_scaling
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    share_kept = ((scaling.original_seq_len / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - share_kept) * frequencies / scaling.factor + share_kept * frequencies


class RopeTables:
    """Cosines and sines of one model, fp32 whatever the model's dtype, made when first needed.

    Plain tensors rather than buffers: `model.to(torch.bfloat16)` would round buffers, and a meta model has none.
    """

    def __init__(self, config: Model) -> None:
        self._config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (stop - start, 1, D), each angle twice, of positions start, …, stop - 1."""
        if device not in self._tables or self._tables[device][0].shape[0] < stop:
            # All positions of the context at once, but for a context that no memory would hold.
            length = max(stop, min(self._config.seq_len, max(2 * stop, 2**20)))
            # Normal tensors even if the first caller is in inference mode: training may follow.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(length, dtype=torch.float32)
                angles = torch.outer(positions, rope_frequencies(self._config).to("cpu")).repeat(1, 2)[:, None]
                self._tables[device] = angles.cos().to(device), angles.sin().to(device)
        cos, sin = self._tables[device]
        return cos[start:stop], sin[start:stop]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, T, N, D) turned by their positions' angles, computed in fp32, in the dtype of x."""
    half = x.shape[-1] // 2
    wide = x.float()
    rotated = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + rotated * sin).to(x.dtype)
