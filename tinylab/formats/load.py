"""Any checkpoint on this disk, opened but not read: Hugging Face folders (safetensors or `.bin`), lit-gpt, llama2.c."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch

from tinylab.errors import CheckpointError
from tinylab.formats import litgpt, llama2c
from tinylab.formats.huggingface import INDEX, read_header, weight_files
from tinylab.formats.huggingface_config import model_from_config
from tinylab.formats.tensors import LazyTensor, Weights, load_weights
from tinylab.formats.torch_archive import TorchArchive
from tinylab.model.transformer import Llama

MAX_INDEX_BYTES = 10_000_000
_PICKLED_INDEX = "pytorch_model.bin.index.json"


def open_weights(path: str | Path) -> Weights:
    """The weights at `path` under Hugging Face's names, checked against their configuration, not read yet.

    Raises CheckpointError for what is no checkpoint, is damaged or hostile, or does not fit its configuration.
    """
    path = Path(path)
    if path.is_file():
        opened = llama2c.open_checkpoint(path) if path.suffix == ".bin" else litgpt.open_checkpoint(path)
    elif (path / litgpt.WEIGHTS).is_file():
        opened = litgpt.open_checkpoint(path)
    elif _has_pickles_only(path):
        opened = _pickled(path)
    else:
        opened = _safetensors(path)
    return opened.check()


def load_folder(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model in a folder, in eval mode and in memory of its own, so that it may be trained and its folder removed.

    dtype: absent, the one stored (float32 if several are). Raises CheckpointError as `open_weights` does.
    """
    return load_weights(open_weights(folder), device, dtype, copy=True)


def _has_pickles_only(folder: Path) -> bool:
    pickled = (folder / _PICKLED_INDEX).is_file() or (folder / "pytorch_model.bin").is_file()
    return pickled and not any((folder / name).is_file() for name in (INDEX, "model.safetensors"))


def _safetensors(folder: Path) -> Weights:
    model = model_from_config(folder / "config.json")
    parts = []
    for path in (folder / file for file in weight_files(folder)):
        stored = read_header(path).items()
        parts.append({n: LazyTensor.stored(path, start, shape, dtype) for n, (dtype, shape, start) in stored})
    return Weights(model, _together(parts, folder), str(folder))


def _pickled(folder: Path) -> Weights:
    """A folder with `pytorch_model.bin`, whole or in parts, read without unpickling (formats/safe_pickle.py)."""
    model = model_from_config(folder / "config.json")
    archives = [TorchArchive(folder / file) for file in _pickled_files(folder)]
    return Weights(model, _together([a.tensors(a.value) for a in archives], folder), str(folder))


def _together(parts: list[dict[str, LazyTensor]], folder: Path) -> dict[str, LazyTensor]:
    """The tensors of all files. Raises CheckpointError for one that stands in two of them: which would be right?"""
    counts = Counter(name for part in parts for name in part)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(
            f"{folder} must hold every tensor once; found in two files: {', '.join(twice[:20])}. Download it again"
        )
    return {name: tensor for part in parts for name, tensor in part.items()}


def _pickled_files(folder: Path) -> list[str]:
    index = folder / _PICKLED_INDEX
    if not index.is_file():
        return ["pytorch_model.bin"]
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} must be at most {MAX_INDEX_BYTES} bytes; found {index.stat().st_size}")
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} must be a JSON object with a weight_map of file names: {error}") from error
    bad = [str(f)[:100] for f in files if not isinstance(f, str) or not re.fullmatch(r"[\w-][\w.-]*\.bin", f)]
    missing = [f for f in files if f not in bad and not (folder / f).is_file()]
    if bad or missing or not files:
        raise CheckpointError(
            f"{index} must name .bin files of its own folder; found {', '.join(bad + missing) or 'none'}"
        )
    return files
