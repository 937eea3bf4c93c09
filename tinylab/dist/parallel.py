"""Parallelism and compilation, applied to a model from outside: the model itself knows nothing of them.

| strategy | weights and moments            | gradients                         | saved                        |
|----------|--------------------------------|-----------------------------------|------------------------------|
| `none`   | whole, in one process          | whole                             | as they are                  |
| `ddp`    | a copy on every rank           | averaged after the backward pass  | rank 0's copy                |
| `fsdp`   | a slice of each matrix (FSDP2) | averaged and scattered            | gathered, tensor by tensor   |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from tinylab.config.schema import Parallel
from tinylab.dist.context import Context
from tinylab.model.precision import resolve_precision

P = ParamSpec("P")


def strategy_of(parallel: Parallel, context: Context) -> str:
    """`none`, `ddp` or `fsdp`: what `parallel.strategy` means for this job."""
    if context.world == 1:
        return "none"
    if parallel.strategy == "auto":
        return "fsdp" if context.device.type == "cuda" else "ddp"
    return parallel.strategy


def layout_of(parallel: Parallel, context: Context) -> dict[str, Any]:
    """How the work is laid out: what may change the last bits of the weights between two starts."""
    return {
        "world_size": context.world,
        "threads": context.threads,
        "device": context.device.type,
        "precision": resolve_precision(context.device, parallel.precision).name,
    }


def shard_model(model: nn.Module, parallel: Parallel, context: Context) -> None:
    """Under `fsdp`, replace every parameter of `model` by this rank's slice. Before the optimizer is built."""
    if strategy_of(parallel, context) != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(context.device.type, (context.world,))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")


def reshard(model: nn.Module) -> None:
    """Under `fsdp`, give back the whole weights that a forward pass without a backward one has gathered."""
    give_back = getattr(model, "reshard", None)
    if give_back is not None:
        give_back()


def compiled(function: Callable[P, Tensor], parallel: Parallel) -> Callable[P, Tensor]:
    """`function` (a forward pass) compiled if `parallel.compile` asks for it; the model's parameters keep their names."""
    return torch.compile(function) if parallel.compile else function


def exchange_with_last(model: nn.Module, last: bool) -> None:
    """Under `fsdp`, exchange gradients in the backward pass of a step's last micro-batch only."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)


def average_gradients(gradients: list[Tensor], parallel: Parallel, context: Context) -> None:
    """Under `ddp`, replace each gradient by its mean over the ranks, in place; under `fsdp` they are that already.

    One sum per gradient, all in flight at once, in the model's order on every rank: no buckets, no copies.
    """
    if strategy_of(parallel, context) != "ddp":
        return
    sums = [distributed.all_reduce(g, async_op=True) for g in gradients]
    for gradient, work in zip(gradients, sums, strict=True):
        assert work is not None
        work.wait()
        gradient.div_(context.world)


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sliced over ranks, on this rank. Every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Copies of whole tensors in CPU memory, one at a time, on ranks that `keep`; the others only take part."""
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            yield name, whole.to("cpu", copy=True)


def like(whole: Tensor, model_tensor: Tensor) -> Tensor:
    """`whole` laid out as `model_tensor`: moved to its device and, under FSDP2, cut to this rank's slice."""
    whole = whole.to(model_tensor.device)
    if not hasattr(model_tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model_tensor.device_mesh, model_tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
