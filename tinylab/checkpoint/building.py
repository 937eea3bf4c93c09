"""The model that a run trains, on each rank as its strategy lays it out: fresh from the seed, or from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tinylab.config.schema import RunConfig
from tinylab.dist.context import Context
from tinylab.dist.parallel import fill_slices, is_sharded, require_equal_machines, shard_model
from tinylab.dist.recompute import recompute_blocks
from tinylab.formats.identity import model_weight_hash
from tinylab.formats.load import load_folder, open_weights
from tinylab.model.names import name_map
from tinylab.model.precision import resolve_precision
from tinylab.model.transformer import Llama


def build_model(config: RunConfig, context: Context, checkpoint: Path | None) -> Llama:
    """The model after `checkpoint`, or the fresh one, ready to train: fp32, on this rank's device, sharded if asked.

    Its values are the same for any strategy and number of ranks; where it is sharded, no rank ever holds all of it.
    Raises LaunchError when the ranks' weights or numbers per machine are not equal as they must be, and CheckpointError
    when the checkpoint does not fit.
    """
    require_equal_machines(config.parallel, context)
    build = _sharded if is_sharded(config.parallel, context) else _whole
    model, digest = build(config, context, checkpoint)
    if context.world > 1:
        context.require_equal(digest, "the weights")
    return model.train()


def _whole(config: RunConfig, context: Context, checkpoint: Path | None) -> tuple[Llama, str]:
    if checkpoint is None:
        model = Llama.empty(config.model, context.device, torch.float32)
        model.init_weights(config.seed)
    else:
        model = load_folder(checkpoint, context.device, torch.float32)
    digest = model_weight_hash(model) if context.world > 1 else ""
    _prepare(model, config, context)
    return model, digest


def _sharded(config: RunConfig, context: Context, checkpoint: Path | None) -> tuple[Llama, str]:
    """Made on the meta device, sharded, then filled tensor by tensor, each rank keeping its slices."""
    model = Llama.empty(config.model, "meta", torch.float32)
    _prepare(model, config, context)
    shard_model(model, config.parallel, context)
    if checkpoint is None:
        return model, fill_slices(model, context.device, lambda n, shape: model.first_values(config.seed, n, shape))
    weights, parts_of = open_weights(checkpoint), name_map(config.model)

    def stored(name: str, shape: torch.Size) -> Tensor:
        values = torch.empty(shape)
        for part in parts_of[name]:
            values[part.rows] = weights.tensors[part.name].load()
        return values

    return model, fill_slices(model, context.device, stored)


def _prepare(model: Llama, config: RunConfig, context: Context) -> None:
    resolve_precision(context.device, config.parallel.precision).prepare(model)
    recompute_blocks(model, config.parallel)
