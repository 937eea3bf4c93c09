"""Parallelism and compilation, applied to a model from outside: the model itself knows nothing of them.

| strategy | weights and moments                        | gradients                                          |
|----------|--------------------------------------------|----------------------------------------------------|
| `none`   | whole, in one process                      | whole                                              |
| `ddp`    | a copy on every rank                       | averaged after the backward pass                   |
| `fsdp`   | a slice of each tensor on each rank (FSDP2)| averaged and scattered in the backward pass        |
| `hsdp`   | slices inside a machine, a copy on each    | scattered inside a machine, averaged across        |

Weights, gradients, their exchange and the optimizer are fp32 in all of them; products are in the run's precision
(model/precision.py). Micro-batches before a step's last one exchange nothing. CPU ranks exchange by gloo, GPUs by NCCL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from tinylab.config.schema import Parallel
from tinylab.dist.context import Context
from tinylab.errors import LaunchError
from tinylab.model.precision import resolve_precision

P = ParamSpec("P")


def strategy_of(parallel: Parallel, context: Context) -> str:
    """`none`, `ddp`, `fsdp` or `hsdp`: what `parallel.strategy` means for this job.

    `hsdp` on one machine is `fsdp`, and with one rank on each machine it is `ddp`.
    """
    if context.world == 1:
        return "none"
    several = 1 < context.local_world < context.world
    if parallel.strategy == "auto":
        if context.device.type != "cuda":
            return "ddp"
        return "hsdp" if several and context.world % context.local_world == 0 else "fsdp"
    if parallel.strategy != "hsdp" or several:
        return parallel.strategy
    return "fsdp" if context.local_world == context.world else "ddp"


def layout_of(parallel: Parallel, context: Context) -> dict[str, Any]:
    """How the work is laid out: what may change the last bits of the weights between two starts."""
    return {
        "world_size": context.world,
        "threads": context.threads,
        "device": context.device.type,
        "precision": resolve_precision(context.device, parallel.precision).name,
        "strategy": strategy_of(parallel, context),
        "reduction": parallel.reduction,
    }


def is_sharded(parallel: Parallel, context: Context) -> bool:
    """Whether each rank holds only slices of the model."""
    return strategy_of(parallel, context) in ("fsdp", "hsdp")


def shard_model(model: nn.Module, parallel: Parallel, context: Context) -> None:
    """Under `fsdp` and `hsdp`, replace every parameter by this rank's slice. Before the optimizer is built.

    The model may be on the meta device; `fill_slices` then gives it memory.
    """
    if not is_sharded(parallel, context):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    shape, names = (context.world,), ("shard",)
    if strategy_of(parallel, context) == "hsdp":
        shape, names = (context.world // context.local_world, context.local_world), ("replicate", "shard")
    mesh = init_device_mesh(context.device.type, shape, mesh_dim_names=names)
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")


def require_equal_machines(parallel: Parallel, context: Context) -> None:
    """Raise LaunchError when the ranks may be laid out by machine and machines have unequal numbers of them."""
    by_machine = parallel.strategy == "hsdp" or (parallel.strategy == "auto" and context.device.type == "cuda")
    if context.world == 1 or not by_machine:
        return
    counts = [int(part) for part in context.gather_tensor(torch.tensor(context.local_world))]
    if len(set(counts)) > 1 or context.world % context.local_world:
        raise LaunchError(
            f'parallel.strategy = "{parallel.strategy}" needs as many ranks on each machine as on the others; found '
            f"{', '.join(map(str, sorted(set(counts))))} ranks per machine, {context.world} in all. "
            'Start equal numbers, or set parallel.strategy = "fsdp"'
        )


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 gathers and scatters as one: each block, and the rest; none without sharding."""
    return [module for module in model.modules() if hasattr(module, "set_custom_reduce_scatter")]


@torch.no_grad()
def fill_slices(model: nn.Module, device: torch.device, whole: Callable[[str, torch.Size], Tensor]) -> str:
    """Give a sharded meta model its memory and values: this rank's slice of `whole(name, shape)` for each parameter.

    At most one whole tensor is alive at a time. Returns a digest of all values, equal on all ranks.
    """
    model.to_empty(device=device)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = whole(name, parameter.shape)
        digest.update(name.encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
        parameter.copy_(like(values, parameter))
    return digest.hexdigest()


def reshard(model: nn.Module) -> None:
    """When sharded, give back the whole weights that a forward pass without a backward one has gathered."""
    give_back = getattr(model, "reshard", None)
    if give_back is not None:
        give_back()


def compiled(function: Callable[P, Tensor], parallel: Parallel) -> Callable[P, Tensor]:
    """`function` (a forward pass) compiled if `parallel.compile` asks for it; the model's parameters keep their names."""
    return torch.compile(function) if parallel.compile else function


def exchange_only_after_last(model: nn.Module, last: bool) -> None:
    """When sharded, let the next backward pass exchange gradients only if its micro-batch is the step's last one."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(last)


def average_gradients(gradients: list[Tensor], parallel: Parallel, context: Context) -> None:
    """Under `ddp`, replace each gradient by its mean over the ranks, in place; when sharded they are that already.

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


def like(whole: Tensor, model_tensor: Tensor) -> Tensor:
    """`whole` laid out as `model_tensor`: moved to its device and, under FSDP2, cut to this rank's slice."""
    whole = whole.to(model_tensor.device)
    if not hasattr(model_tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model_tensor.device_mesh, model_tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
