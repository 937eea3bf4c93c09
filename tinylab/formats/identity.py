"""The identity of a model's weights: one hash that does not change with format, sharding, file layout or metadata.

The hash of a checkpoint, of the model loaded from it in its own dtype, and of the model that was saved to it are equal.
"""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from tinylab.formats.tensors import Weights
from tinylab.model.names import to_huggingface
from tinylab.model.transformer import Llama


def weight_hash(opened: Weights) -> str:
    """The hash of an opened checkpoint. Reads one tensor at a time.

    A tied head and rotary buffers do not count: some formats store them, others do not.
    """
    return hash_tensors((name, opened.tensors[name].load()) for name in sorted(opened.tensors))


def model_weight_hash(model: Llama) -> str:
    """The hash of a model in memory, on any device. Its parameters must not be sliced over ranks."""
    return hash_tensors(sorted(to_huggingface(dict(model.named_parameters()), model.config).items()))


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the name (Hugging Face's), dtype, shape and bytes of each tensor; they must come in name order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
