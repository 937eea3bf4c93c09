"""Any checkpoint on this disk, opened or loaded: Hugging Face folders (safetensors or `.bin`), lit-gpt, llama2.c."""

import gc
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tinylab.errors import CheckpointError
from tinylab.formats import huggingface, litgpt, llama2c
from tinylab.formats.mapping import map_parts
from tinylab.formats.tensors import LazyTensor, Weights, read_values
from tinylab.model.names import name_map
from tinylab.model.transformer import Llama

_MAPPED_BYTES = 2**20
"""Smaller parameters are copied: they cost nothing, and a small model depends on no file and no alignment."""


def open_weights(path: str | Path) -> Weights:
    """The weights at `path` under Hugging Face's names, checked against their configuration, not read yet.

    Raises CheckpointError for what is no checkpoint, is damaged or hostile, or does not fit its configuration.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".bin":
        opened = llama2c.open_checkpoint(path)
    elif path.is_file() or (path / litgpt.WEIGHTS).is_file():
        opened = litgpt.open_checkpoint(path)
    else:
        opened = huggingface.open_folder(path)
    return opened.check()


def load_folder(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model at a path, in eval mode and in memory of its own, so that it may be trained and its files removed.

    dtype: absent, the one stored (float32 if several are). Raises CheckpointError as `open_weights` does.
    """
    return load_weights(open_weights(folder), device, dtype, copy=True)


@torch.no_grad()
def load_weights(
    weights: Weights, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, copy: bool = False
) -> Llama:
    """The model in eval mode, filled tensor by tensor: the model once in memory, plus one tensor.

    dtype: absent, the one stored. On the CPU in that dtype, matrices of a megabyte and more whose parts are
    in one file are mapped, not read (privately: writing to them does not change the file); `copy` reads them instead.
    Raises CheckpointError listing every tensor that does not fit.
    """
    weights = weights.check()
    with _no_collection():
        model = Llama.empty(weights.model, device, dtype or weights.dtype)
    on_cpu = torch.device(device).type == "cpu"
    to_read: list[tuple[Path, int, Tensor]] = []
    for name, parts in name_map(weights.model).items():
        module = model.get_submodule(name.removesuffix(".weight"))
        target = module.get_parameter("weight")
        tensors = [weights.tensors[part.name] for part in parts]
        mapped = _map(tensors, target) if on_cpu and not copy else None
        if mapped is not None:
            module.register_parameter("weight", torch.nn.Parameter(mapped))
            continue
        for tensor, rows in zip(tensors, (target[part.rows] for part in parts), strict=True):
            if on_cpu and tensor.place is not None and tensor.dtype == rows.dtype:
                to_read.append((*tensor.place, rows))
            else:
                rows.copy_(tensor.load())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # memory is new: most of the time goes into its pages
        list(pool.map(lambda job: read_values(*job), to_read))
    if weights.model.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: everything a model under construction allocates is alive, and a search through it
    and through all of torch takes longer than opening 1.1B parameters."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _map(tensors: list[LazyTensor], target: Tensor) -> Tensor | None:
    """The values of `tensors`, one after the other, as memory mapped from their file; None where that is impossible."""
    size = target.element_size()
    places = [t.place for t in tensors if t.place is not None and t.dtype == target.dtype]
    if target.numel() * size < _MAPPED_BYTES or len(places) < len(tensors) or len({path for path, _ in places}) > 1:
        return None
    path, first = places[0]
    parts = [(start, size * math.prod(t.shape)) for (_, start), t in zip(places, tensors, strict=True)]
    if first % size:
        return None
    try:
        mapped = map_parts(path, parts)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy the file again") from error
    return None if mapped is None else torch.frombuffer(mapped, dtype=target.dtype).view(target.shape)
