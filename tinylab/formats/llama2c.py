"""llama2.c's `.bin` files, versions 0 and 1: fp32 weights, one kind after the other over all layers.

Rotary positions turn neighbouring pairs there and the two halves of a head here, so the rows of q and k are
permuted. RMSNorm's epsilon (1e-5) and the rotary base (10,000) are constants of the format, not in the file.
Source: karpathy/llama2.c:export.py, run.c.
"""

from __future__ import annotations

import math
import os
import struct
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
"""Order of the kinds in the file; version 0 also stores the rotary cosines and sines."""


def open_checkpoint(path: str | Path) -> Weights:
    """A llama2.c `.bin` under Hugging Face's names, opened but not read.

    Raises CheckpointError when the size is not exactly what the header says, or the version is quantized (2).
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
    """Version, offset of the first weight, and configuration."""
    if header[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path} must be a llama2.c file; found an archive of torch. Hugging Face's weights are named by their "
            "folder, which holds config.json too; lit-gpt's end in .pth"
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
    d_model, d_ff, n_layer, n_head, n_kv_head, vocab_size, seq_len = _PARAMS.unpack_from(header, at)
    shared = vocab_size > 0 if version == 0 else header[at + _PARAMS.size] == 1
    counts = (d_model, d_ff, n_layer, n_head, n_kv_head, abs(vocab_size), seq_len)
    if min(counts) < 1 or n_layer > _MAX_LAYERS or max(counts[:-1]) * 4 > size:  # all but the last have a tensor each
        raise CheckpointError(f"{path} must begin with a llama2.c header; found the sizes {list(counts)}")
    try:
        model = Model(
            vocab_size=abs(vocab_size),
            n_layer=n_layer,
            d_model=d_model,
            n_head=n_head,
            n_kv_head=n_kv_head,
            d_ff=d_ff,
            seq_len=seq_len,
            norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_embeddings=shared,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} must begin with a llama2.c header; found a wrong one: {error}") from error
    return version, start, model


def _layout(
    path: Path, model: Model, order: tuple[str, ...], start: int, size: int
) -> tuple[dict[str, LazyTensor], int]:
    """Every tensor at its place, and the offset behind the last. Stops early when the file is too short."""
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
            stored = LazyTensor.stored(path, start + i * step, shape, torch.float32)
            tensors[name] = stored if heads is None else _with_halves(stored, heads)
        start += count * step
    return tensors, start


def _with_halves(pairs: LazyTensor, heads: int) -> LazyTensor:
    return LazyTensor(pairs.shape, pairs.dtype, lambda: halves_from_pairs(pairs.load(), heads))


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads·D, C) whose rotary pairs are neighbours, reordered so that pair j is rows j and j + D/2 of a head."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
