"""The one name map: our parameters, Hugging Face's, and which rows of a fused matrix are which.

In memory `attn.qkv` is one matrix (rows: all query heads, all key heads, all value heads) and `mlp.gate_up` another;
in checkpoints each part is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from tinylab.config.architecture import Model

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """A tensor of a checkpoint, and where it is in the parameter of ours that contains it."""

    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    start: int = 0
    """Its first row in our parameter; the other rows follow it."""

    @property
    def rows(self) -> slice:
        """Its rows in our parameter."""
        return slice(self.start, self.start + self.shape[0])


def name_map(config: Model) -> dict[str, tuple[Part, ...]]:
    """The parts of each of our parameters, by its name: one, or those of a fused matrix from the first row down.

    A tied head is no tensor of its own and is left out on both sides.
    """
    C, F, D = config.d_model, config.d_ff, config.head_size
    q, kv = config.n_head * D, config.n_kv_head * D
    names = {"embed.weight": (Part("model.embed_tokens.weight", (config.vocab_size, C)),)}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        attn, mlp = theirs + "self_attn.", theirs + "mlp."
        names |= {
            ours + "attn_norm.weight": (Part(theirs + "input_layernorm.weight", (C,)),),
            ours + "attn.qkv.weight": (
                Part(attn + "q_proj.weight", (q, C)),
                Part(attn + "k_proj.weight", (kv, C), q),
                Part(attn + "v_proj.weight", (kv, C), q + kv),
            ),
            ours + "attn.out.weight": (Part(attn + "o_proj.weight", (C, q)),),
            ours + "mlp_norm.weight": (Part(theirs + "post_attention_layernorm.weight", (C,)),),
            ours + "mlp.gate_up.weight": (
                Part(mlp + "gate_proj.weight", (F, C)),
                Part(mlp + "up_proj.weight", (F, C), F),
            ),
            ours + "mlp.down.weight": (Part(mlp + "down_proj.weight", (C, F)),),
        }
    names["norm.weight"] = (Part("model.norm.weight", (C,)),)
    if not config.tie_embeddings:
        names["head.weight"] = (Part("lm_head.weight", (config.vocab_size, C)),)
    return names


def to_huggingface(state: Mapping[str, Tensor], config: Model) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names: views of the same memory, nothing is copied."""
    parts = ((state[ours].detach(), part) for ours, parts in name_map(config).items() for part in parts)
    return {part.name: tensor[part.rows] for tensor, part in parts}
