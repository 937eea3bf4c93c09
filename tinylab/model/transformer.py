"""Llama: embedding, blocks of attention and SwiGLU with RMSNorm before each, a final norm, a head.

    x = embed(ids)
    for each block:  x = x + attn(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Touvron et al. 2023; grouped-query attention after Ainslie et al. 2023. Equal to transformers' LlamaForCausalLM, but
q/k/v are one matrix (rows: all query heads, then all key heads, then all value heads), and gate/up are one.
The residual stream x is fp32 whatever the dtype of the weights, as it is under autocast in training: in bf16 each of
its 2L sums would round it to 8 bits.
Letters: B batch, T tokens, H query heads, K key-value heads, D head size, C model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylab.config.architecture import Model
from tinylab.errors import ConfigError
from tinylab.model.attention import TORCH
from tinylab.model.cache import KVCache
from tinylab.model.rope import RopeTables, apply_rope

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, H, T, D), k, v (B, K, S, D) to (B, H, T, D): a backend of attention.py with its documents."""


class Linear(nn.Linear):
    """A matrix without bias. On the meta device no first values are drawn: torch would import its compiler for that."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """One row per id; as `Linear` on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019).

    Computed in fp32; the result has the weight's dtype.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions: (B, T, C) to (B, T, C)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.n_kv_head, config.head_size
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.d_model, heads * config.head_size)
        self.out = Linear(config.n_head * config.head_size, config.d_model)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, cache: KVCache | None, layer: int
    ) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_size)
        turned = apply_rope(heads[:, :, : -self.n_kv_head], *rope)
        q, k = (h.transpose(1, 2) for h in turned.split((self.n_head, self.n_kv_head), dim=2))
        v = heads[:, :, -self.n_kv_head :].transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)), gate and up being the two halves of one matrix."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normed residual stream and added to it."""

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, attend, cache, self.layer)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """The whole model. Weights are as `torch.nn` leaves them until `init_weights` or a loader fills them."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.rope = RopeTables(config)
        self.attention = TORCH
        """The backend; whoever trains the model may set another one (attention_choice.py)."""

    @classmethod
    def empty(cls, config: Model, device: str | torch.device, dtype: torch.dtype) -> Llama:
        """The model on a device with its memory set aside but not filled, ready for `init_weights` or a loader."""
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():  # `to_empty` would do it by way of torch's symbolic shapes, slow to import
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, device=device, dtype=dtype)))
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
        return model

    def forward(self, ids: Tensor, *, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of ids (B, T), in the head's dtype.

        A cache holds the keys and values of the tokens before `ids`, and takes up theirs. With document_ids (B, T) a
        token sees only its own document.
        """
        return self.head(self.hidden(ids, cache=cache, document_ids=document_ids))

    def hidden(self, ids: Tensor, *, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """The residual stream after the final norm (B, T, C): what the head reads."""
        start = 0 if cache is None else cache.length
        rope = self.rope.at(start, start + ids.shape[1], ids.device)
        documents = None
        if document_ids is not None:
            if self.attention.documents is None:
                raise ConfigError(f"attention backend {self.attention.name} cannot keep documents apart; use another")
            documents = self.attention.documents(document_ids)
        attend = partial(self.attention.attend, documents=documents)
        x = self.embed(ids).float()
        for block in self.blocks:
            x = block(x, rope, attend, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight from `seed`, each from a generator of its own name, always drawn on the CPU.

        So the values depend on no global state, order, device or thread count.

        | `init`      | embedding, head, qkv, gate_up | attention out, MLP down | norms |
        |-------------|-------------------------------|-------------------------|-------|
        | `tinyllama` | N(0, 2 / (5 C))               | N(0, 1 / (C L²))        | 1     |
        | `normal`    | N(0, init_std²)               | the same                | 1     |

        The first row is jzhang38/TinyLlama:lit_gpt/model.py.
        """
        for name, weight in self.named_parameters():
            weight.copy_(self.first_values(seed, name, weight.shape))

    def first_values(self, seed: int, name: str, shape: torch.Size) -> Tensor:
        """What `init_weights` fills the parameter `name` with: fp32 on the CPU, wherever the parameter itself is."""
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(self._init_std(name))

    def _init_std(self, name: str) -> float:
        config = self.config
        if config.init == "normal":
            return config.init_std
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            return 1 / (math.sqrt(config.d_model) * config.n_layer)
        return math.sqrt(2 / (5 * config.d_model))
