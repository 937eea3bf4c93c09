"""Parallelism and compilation, applied to a model from outside: the model itself knows nothing of them.

| strategy | weights and moments            | gradients                         | saved                        |
|----------|--------------------------------|-----------------------------------|------------------------------|
| `none`   | whole, in one process          | whole                             | as they are                  |
| `ddp`    | a copy on every rank           | averaged during the backward pass | rank 0's copy                |
| `fsdp`   | a slice of each matrix (FSDP2) | averaged and scattered            | gathered, tensor by tensor   |
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tinylab.config.schema import Parallel
from tinylab.dist.context import Context


def strategy_of(parallel: Parallel, context: Context) -> str:
    """`none`, `ddp` or `fsdp`: what `parallel.strategy` means for this job."""
    if context.world == 1:
        return "none"
    if parallel.strategy == "auto":
        return "fsdp" if context.device.type == "cuda" else "ddp"
    return parallel.strategy


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


def wrap_model(model: nn.Module, parallel: Parallel, context: Context) -> nn.Module:
    """What a training step calls: `model`, compiled if asked, its gradients averaged over the ranks."""
    wrapped = model
    if strategy_of(parallel, context) == "ddp":
        on_device = [context.device] if context.device.type == "cuda" else None
        # The weights were compared before; gradient buckets as views spare a copy of every gradient.
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=on_device, init_sync=False, gradient_as_bucket_view=True
        )
    if parallel.compile:
        wrapped.compile()
    return wrapped


def without_sync(wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """For one backward pass: gradients are exchanged only with the last micro-batch of a step."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    set_sync = getattr(wrapped, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)
    return nullcontext()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sliced over ranks, on this rank. Every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole and on the CPU, one at a time, on ranks that `keep`; others only take part."""
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            yield name, whole.cpu()


def like(whole: Tensor, model_tensor: Tensor) -> Tensor:
    """`whole` laid out as `model_tensor`: moved to its device and, under FSDP2, cut to this rank's slice."""
    whole = whole.to(model_tensor.device)
    if not hasattr(model_tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model_tensor.device_mesh, model_tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of whole tensors: equal weights, equal digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
