"""The identity of a model's weights: one hash that does not change with format, sharding, file layout or metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from tinylab.formats.load import open_weights


def weight_hash(path: str | Path) -> str:
    """SHA-256 over all tensors under Hugging Face's names in name order: name, dtype, shape, bytes.

    A tied head and rotary buffers do not count: some formats store them, others do not. Reads one tensor at a time.
    Raises CheckpointError for what is no checkpoint or is damaged.
    """
    tensors = open_weights(path).tensors
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].load()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
