"""What a step changes: weights, moments, random generators and the step number; to a checkpoint and back, bit for bit.

Schedule and data order are functions of the step and have no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylab.checkpoint.building import build_model
from tinylab.checkpoint.snapshot import own_start
from tinylab.checkpoint.store import load_rng, open_optimizer, read_record
from tinylab.config.schema import Parallel, RunConfig
from tinylab.dist.canonical import use_plain_kernels
from tinylab.dist.context import Context
from tinylab.dist.parallel import compiled
from tinylab.errors import CheckpointError
from tinylab.model.loss import MicroBatch, loss_sum
from tinylab.model.transformer import Llama
from tinylab.optim.build import build_optimizer


@dataclass(kw_only=True)
class TrainState:
    """A run between two steps."""

    model: Llama
    """The model itself, its parameters under their own names."""
    parallel: Parallel
    """How its work is laid out over the ranks."""
    optimizer: torch.optim.Optimizer
    loss: Callable[[Llama, MicroBatch], Tensor] = loss_sum
    """Sum of the losses of a micro-batch: compiled where the run asks for it."""
    step: int = 0
    """Optimizer steps done."""
    hours: float = 0.0
    """Device hours spent in the steps of the final lineage: seconds of each step times ranks / 3600."""
    faults: dict[str, Any] = field(default_factory=dict)
    """What training/faults.py judges the next steps by: plain values, the same on every rank."""


def build_state(config: RunConfig, context: Context, checkpoint: Path | None) -> TrainState:
    """The state after `checkpoint`, or the fresh one of step 0.

    Raises LaunchError when the ranks' weights are not equal, and CheckpointError when the checkpoint does not fit.
    """
    torch.manual_seed(config.seed + context.rank)
    model = build_model(config, context, checkpoint)
    optimizer = build_optimizer(model, config.optimizer)
    if config.parallel.reduction == "canonical":
        use_plain_kernels(optimizer)
    state = TrainState(
        model=model, parallel=config.parallel, optimizer=optimizer, loss=compiled(loss_sum, config.parallel)
    )
    if checkpoint is not None:
        record = read_record(checkpoint)
        state.step, state.hours = record["step"], record.get("hours", 0.0)
        state.faults = record.get("faults", {})
        _load_optimizer(state, record, checkpoint)
        _load_rng(load_rng(checkpoint), context, config.seed, state.step)
    return state


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as `<parameter>.<name>`, in the model's order."""
    result = {}
    for name, parameter in state.model.named_parameters():
        for key, value in sorted(state.optimizer.state.get(parameter, {}).items()):
            assert isinstance(value, Tensor), f"optimizer state {name}.{key} is no tensor"
            result[f"{name}.{key}"] = value
    return result


def _load_optimizer(state: TrainState, record: Mapping[str, Any], checkpoint: Path) -> None:
    """Give every parameter its tensors back: of those that follow a sharded one, only this rank's rows are read.

    Raises CheckpointError listing names that do not match.
    """
    parameters = dict(state.model.named_parameters())
    with open_optimizer(checkpoint) as tensors:
        unknown = [n for n in tensors if n.rpartition(".")[0] not in parameters]
        bare = sorted(set(parameters) - {n.rpartition(".")[0] for n in tensors})
        # Some optimizers have no tensors for some parameters, or none at all; older checkpoints are all AdamW's.
        complete = not bare if "optimizer_tensors" not in record else len(tensors) == record["optimizer_tensors"]
        if unknown or not complete:
            raise CheckpointError(
                f"{checkpoint}/trainer/optimizer.safetensors must hold the moments of every parameter; "
                f"without moments: {', '.join(bare) or 'none'}; unknown: {', '.join(unknown) or 'none'}. "
                "Resume with the configuration that wrote it"
            )
        for name, stored in tensors.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = parameters[parameter_name]
            state.optimizer.state[parameter][key] = _own_part(stored, parameter)


def _own_part(stored: Any, parameter: Tensor) -> Tensor:
    """A stored tensor on the device of `parameter`, whole, or the rows of it that this rank has of `parameter`."""
    shape = stored.get_shape()
    if not shape:
        return stored[...].clone().to(parameter.device)
    if not hasattr(parameter, "device_mesh") or tuple(shape) != tuple(parameter.shape):
        return stored[:].clone().to(parameter.device)
    from torch.distributed.tensor import DTensor

    local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
    start = own_start(parameter)
    rows = stored[start : start + len(local)].clone() if len(local) else torch.empty_like(local)
    return DTensor.from_local(
        rows.to(local.device),
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _load_rng(rng: Mapping[str, Tensor], context: Context, seed: int, step: int) -> None:
    """Restore this rank's generators; on another number of ranks or device they are seeded from seed, step, rank."""
    kinds = ("cpu", "cuda") if context.device.type == "cuda" else ("cpu",)
    if {f"{kind}.{rank}" for kind in kinds for rank in range(context.world)} != set(rng):
        torch.manual_seed((seed + step * 1_000_003 + context.rank) % 2**63)
        return
    torch.set_rng_state(rng[f"cpu.{context.rank}"])
    if context.device.type == "cuda":
        torch.cuda.set_rng_state(rng[f"cuda.{context.rank}"], context.device)
