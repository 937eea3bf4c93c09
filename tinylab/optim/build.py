"""The optimizer of a run, by its kind: groups of parameters, their weight decay and their share of the rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tinylab.config.architecture import Model
from tinylab.config.schema import Optimizer
from tinylab.model.names import name_map
from tinylab.model.transformer import Llama


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """The model's parameters in groups, each with `names`, `params`, `weight_decay` and `rate_scale`, in its order.

    A group's learning rate is the schedule's times `rate_scale`: 1 here, for other kinds of optimizer to change.

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
            group = {"params": list(params), "names": list(names), "weight_decay": weight_decay, "rate_scale": 1.0}
            groups.append(group)
    return groups


def logical_matrices(config: Model, name: str) -> list[slice]:
    """The rows of each matrix that the parameter `name` is made of: one, but for `attn.qkv` and `mlp.gate_up`.

    An optimizer that treats a matrix as one object (its norm, its singular values) must treat each of these apart.
    Rows of the parameter as a whole, which under FSDP2 is sliced over the ranks. Raises KeyError for an unknown name.
    """
    return [part.rows for part in name_map(config)[name]]


def _adamw(model: Llama, optimizer: Optimizer) -> torch.optim.Optimizer:
    """torch's AdamW (Loshchilov and Hutter 2019), fused where every parameter is on a CPU or CUDA device."""
    return torch.optim.AdamW(
        parameter_groups(model, optimizer),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=all(weight.device.type in ("cpu", "cuda") for weight in model.parameters()),
    )


KINDS: dict[str, Callable[[Llama, Optimizer], torch.optim.Optimizer]] = {"adamw": _adamw}
"""What builds an optimizer, by `optimizer.kind`. Each of its groups needs `rate_scale`, as in `parameter_groups`."""


def build_optimizer(model: Llama, optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.kind` over the model's parameters. `train_step` sets the rates."""
    return KINDS[optimizer.kind](model, optimizer)
