"""The identity of a model's weights: one hash that does not change with sharding, file layout or metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylab.checkpoint.huggingface import read_header, to_huggingface, weight_files
from tinylab.errors import CheckpointError
from tinylab.model.transformer import Llama


def weight_hash(folder: Path) -> str:
    """Hash of all tensors of a Hugging Face folder, one tensor in memory at a time.

    Raises CheckpointError naming the file that is missing, truncated or absurd, or a tensor that stands in two files.
    """
    where: dict[str, str] = {}
    for file in weight_files(folder):
        for name in read_header(folder / file):
            if name in where:
                raise CheckpointError(f"{folder}: {name} must stand in one file; found in {where[name]} and {file}")
            where[name] = file
    try:
        opened = {file: safe_open(str(folder / file), framework="pt") for file in set(where.values())}
        return tensor_hash((name, opened[where[name]].get_tensor(name)) for name in sorted(where))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from error


def model_hash(model: Llama) -> str:
    """Hash of a model in memory: that of the Hugging Face folder it would be saved to in its dtype."""
    return tensor_hash(sorted(to_huggingface(model.state_dict(), model.config).items()))


def tensor_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of tensors that come in name order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
