"""The keys and values of the tokens seen so far, kept for the tokens that follow.

Letters: B batch, T tokens, K key-value heads, S tokens of room, D head size.
"""

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import ConfigError


class KVCache:
    """Keys and values of every layer, with room for all tokens set aside at once.

    `keys[layer]` and `values[layer]` are (B, K, S, D), of which the first `length` tokens are filled. The model
    advances `length` once a forward pass is through all layers.
    """

    def __init__(
        self, config: Model, batch: int, size: int, *, device: torch.device | str = "cpu", dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, size, config.head_size)
        self.size, self.length = size, 0
        self.keys = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.values = torch.empty(shape, device=device, dtype=dtype).unbind()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of the next T tokens; return all keys and values so far (B, K, length + T, D)."""
        stop = self.length + k.shape[2]
        if stop > self.size:
            raise ConfigError(f"the key-value cache has room for {self.size} tokens; found {stop}. Make it larger")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]
