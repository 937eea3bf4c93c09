"""AdamW (Loshchilov and Hutter 2019) with weight decay on the parameters it is meant for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tinylab.config.schema import Optimizer


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The model's parameters as AdamW's groups, each with `names`, `params` and `weight_decay`, in the model's order.

    | `decay`    | decayed                                                                     | spared    |
    |------------|-----------------------------------------------------------------------------|-----------|
    | `matrices` | 2-D weights but the embedding, so not a head tied to it either              | the rest  |
    | `all`      | everything, norms and embedding too (jzhang38/TinyLlama:pretrain/tinyllama.py) | nothing |
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]

    def decays(name: str, weight: nn.Parameter) -> bool:
        return optimizer.decay == "all" or (weight.ndim == 2 and name.rpartition("embed.weight")[1] == "")

    groups = []
    for wanted, weight_decay in ((True, optimizer.weight_decay), (False, 0.0)):
        chosen = [(name, weight) for name, weight in named if decays(name, weight) is wanted]
        if chosen:
            names, params = zip(*chosen, strict=True)
            groups.append({"params": list(params), "names": list(names), "weight_decay": weight_decay})
    return groups


def build_adamw(model: nn.Module, optimizer: Optimizer) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`, in its fused form where every parameter lies on a CPU or CUDA device."""
    fused = all(weight.device.type in ("cpu", "cuda") for weight in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model, optimizer),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=fused,
    )
