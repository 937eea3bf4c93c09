"""Any checkpoint on this disk, opened but not read: Hugging Face folders (safetensors or `.bin`), lit-gpt, llama2.c."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylab.checkpoint import litgpt, llama2c
from tinylab.checkpoint.huggingface import model_from_config, read_header, weight_files
from tinylab.checkpoint.lazy import LazyTensor, Weights
from tinylab.checkpoint.torchzip import TorchArchive
from tinylab.errors import CheckpointError

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


def _has_pickles_only(folder: Path) -> bool:
    pickled = (folder / _PICKLED_INDEX).is_file() or (folder / "pytorch_model.bin").is_file()
    return pickled and not any(folder.glob("*.safetensors"))


def _safetensors(folder: Path) -> Weights:
    model = model_from_config(folder / "config.json")
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(folder):
        path = folder / file
        header, read, places = read_header(path), _reader(path), _places(path)
        for name, (dtype, shape) in header.items():
            if name in tensors:
                raise CheckpointError(f"{folder} must hold {name} once; found it in two files")
            tensors[name] = LazyTensor(shape, dtype, read(name), place=(path, places[name]))
    return Weights(model, tensors, str(folder))


def _places(path: Path) -> dict[str, int]:
    """The byte at which each tensor of a safetensors file begins, after the library has checked the whole header."""
    try:
        safe_open(str(path), framework="pt")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy the file again") from error
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _reader(path: Path) -> Callable[[str], Callable[[], Tensor]]:
    """Functions that read single tensors of one safetensors file, which is opened when the first is asked for."""
    opened: list[Any] = []

    def of(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            try:
                if not opened:
                    opened.append(safe_open(str(path), framework="pt"))
                return opened[0].get_tensor(name)
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CheckpointError(f"cannot read {name} from {path}: {error}. Copy the file again") from error

        return read

    return of


def _pickled(folder: Path) -> Weights:
    """A folder with `pytorch_model.bin`, whole or in parts, read without unpickling (checkpoint/pickles.py)."""
    model = model_from_config(folder / "config.json")
    tensors: dict[str, LazyTensor] = {}
    for file in _pickled_files(folder):
        value = TorchArchive(folder / file).value
        if not isinstance(value, dict):
            raise CheckpointError(f"{folder / file} must hold a state dict; found a {type(value).__name__}")
        tensors |= {str(k): v for k, v in value.items() if isinstance(v, LazyTensor)}
    return Weights(model, tensors, str(folder))


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
