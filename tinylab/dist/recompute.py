"""Activation checkpointing: less memory for more arithmetic, by `parallel.recompute`.

| `recompute` | a block keeps for its backward pass             | computed again                             |
|-------------|--------------------------------------------------|--------------------------------------------|
| `none`      | everything that its operations need              | nothing                                    |
| `selective` | its input, results of products and of attention  | norms, rotation, SwiGLU's elementwise part |
| `full`      | its input                                        | the block's whole forward pass             |

What is computed again has the bits of the first time, so losses and gradients do too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tinylab.config.schema import Parallel


def recompute_blocks(model: nn.Module, parallel: Parallel) -> None:
    """Change how each block of `model` runs, in place. Before the model is sharded; parameters keep their names."""
    if parallel.recompute == "none":
        return
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    how: dict[str, Any] = {"use_reentrant": False}
    if parallel.recompute == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _expensive_operations())
    for block in model.get_submodule("blocks").children():
        block.forward = partial(checkpoint, block.forward, **how)


def _expensive_operations() -> list[Any]:
    """Matrix products and every attention kernel that this torch has."""
    names = (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    found = [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]
    flash = getattr(torch.ops, "flash_attn", None)
    more = (getattr(flash, name, None) for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"))
    return found + [operation.default for operation in more if operation is not None]
