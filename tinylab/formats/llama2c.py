"""llama2.c's `.bin` files, versions 0 and 1: weights in fp32, grouped by kind, each kind for all layers in turn.

llama2.c rotates neighbouring pairs of a head's values and tinylab its two halves, so the rows of q and k are permuted.
RMSNorm's epsilon (1e-5) and the rotary base (10,000) are constants of the format and not stored.
Source: karpathy/llama2.c:export.py, run.c.
"""

import math
import os
import struct
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats.tensors import LazyTensor, Weights
from tinylab.model.names import name_map

MAGIC = 0x616B3432
_V1_HEADER_BYTES = 256
_MAX_LAYERS = 10_000
_PARAMS = struct.Struct("<7i")
_SIZES = ("d_model", "d_ff", "n_layer", "n_head", "n_kv_head", "vocab_size", "seq_len")
_KINDS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
_ORDER = {
    0: ("embed", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm", "rope", "output"),
    1: ("attention_norm", "ffn_norm", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"),
}
"""The order of the kinds in a file, by version. Version 0 stores the rotary cosines and sines too."""


def open_checkpoint(path: str | Path) -> Weights:
    """A llama2.c `.bin` under Hugging Face's names, opened but not read.

    Raises CheckpointError for a file of another size than its header says, and for the quantized version 2.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = file.read(_V1_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    version, start, model = _parse(path, header, size)
    tensors, stop = _layout(path, model, _ORDER[version], start, size)
    if stop != size:
        raise CheckpointError(
            f"{path} must be {stop} bytes long by its own header (llama2.c version {version}); found {size}. "
            "It is truncated or no llama2.c file: copy it again"
        )
    return Weights(model, tensors, str(path))


def _parse(path: Path, header: bytes, size: int) -> tuple[int, int, Model]:
    """The version, the offset of the first weight in bytes, and the configuration."""
    if header[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path} must be a llama2.c file; found a torch archive. Name a Hugging Face model by its folder, with its "
            "config.json; give a lit-gpt checkpoint a name that ends in .pth"
        )
    if len(header) < _PARAMS.size:
        raise CheckpointError(f"{path} must begin with a llama2.c header; found {len(header)} bytes")
    version, start, at = 0, _PARAMS.size, 0
    if int.from_bytes(header[:4], "little") == MAGIC and len(header) == _V1_HEADER_BYTES:
        version, start, at = int.from_bytes(header[4:8], "little", signed=True), _V1_HEADER_BYTES, 8
    if version not in _ORDER:
        raise CheckpointError(
            f"{path} must be llama2.c version 0 or 1 (fp32); found version {version}. Export it again with --version 1"
        )
    sizes = dict(zip(_SIZES, _PARAMS.unpack_from(header, at), strict=True))
    shared = sizes["vocab_size"] > 0 if version == 0 else header[at + _PARAMS.size] == 1
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    counts = list(sizes.values())
    # Each count but seq_len is a side of a stored tensor.
    if min(counts) < 1 or sizes["n_layer"] > _MAX_LAYERS or max(counts[:-1]) * 4 > size:
        raise CheckpointError(f"{path} must begin with a llama2.c header; found the sizes {counts}")
    try:
        model = Model(**sizes, norm_eps=1e-5, rope_theta=10_000.0, tie_embeddings=shared)
    except ConfigError as error:
        raise CheckpointError(f"{path} must begin with a llama2.c header; found a wrong one: {error}") from error
    return version, start, model


def _layout(
    path: Path, model: Model, order: tuple[str, ...], start: int, size: int
) -> tuple[dict[str, LazyTensor], int]:
    """Every tensor, and the offset where the last one ends. Stops at the first kind that the file is too short for."""
    shapes = {part.name: part.shape for parts in name_map(model).values() for part in parts}
    tensors: dict[str, LazyTensor] = {}
    for kind in order:
        if kind == "rope":
            start += 4 * model.seq_len * model.head_size
            continue
        count = model.n_layer if kind in _KINDS else 1
        names = [f"model.layers.{i}.{_KINDS[kind]}.weight" if kind in _KINDS else _TOP[kind] for i in range(count)]
        if names[0] not in shapes:  # a tied head
            continue
        shape = shapes[names[0]]
        step = 4 * math.prod(shape)
        if start + count * step > size:
            return tensors, start + count * step
        heads = {"wq": model.n_head, "wk": model.n_kv_head}.get(kind)
        for i, name in enumerate(names):
            tensors[name] = LazyTensor.stored(path, start + i * step, shape, torch.float32)
            if heads is not None:
                load = partial(_load_halves, tensors[name], heads)
                tensors[name] = LazyTensor(shape, torch.float32, load)
        start += count * step
    return tensors, start


def _load_halves(pairs: LazyTensor, heads: int) -> Tensor:
    """Rows (heads·D, C) whose rotary pairs are neighbours, reordered: pair j becomes rows j and j + D/2 of its head."""
    rows = pairs.load()
    return rows.view(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
