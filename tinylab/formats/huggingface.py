"""Hugging Face's Llama folder, both ways: config.json, safetensors with their index.

A folder is never trusted: no pickle is read, the configuration must be a Llama that tinylab computes exactly, file
names in an index stay inside the folder, and every header is checked before a tensor is read.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface_config import model_from_config, write_config
from tinylab.model.names import to_huggingface
from tinylab.runs.durable import disk_error

__all__ = [
    "StoredTensor",
    "model_from_config",
    "read_header",
    "save_weights",
    "weight_files",
    "write_config",
]

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 10_000_000
MAX_INDEX_BYTES = 10_000_000
MAX_SHARD_BYTES = 5_000_000_000
_HEADER_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """The byte of the file at which its values begin."""


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder: those of its index, or the single file.

    Raises CheckpointError for an index that is unreadable, names files outside the folder, or files that are missing.
    """
    index = folder / INDEX
    if not index.exists():
        if (folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise CheckpointError(f"{folder} must hold {INDEX} or model.safetensors; neither was found")
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} must be at most {MAX_INDEX_BYTES} bytes; found {index.stat().st_size}")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} must be a JSON object with a weight_map of file names: {error}") from error
    bad = [f for f in files if not isinstance(f, str) or not re.fullmatch(r"[\w.-]+\.safetensors", f)]
    if bad:
        raise CheckpointError(
            f"{index} must name .safetensors files of its own folder; found {', '.join(map(repr, bad))}"
        )
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names files that are missing: {', '.join(missing)}. Copy or download them again"
        )
    if not files:
        raise CheckpointError(f"{index} names no file; its weight_map is empty")
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, from its header alone, which safetensors itself has checked too.

    Raises CheckpointError naming the file if the header is absurd or the file is not exactly as long as it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} must begin with a safetensors header of at most {MAX_HEADER_BYTES} bytes inside the file; "
                    f"found {length} in a file of {size} bytes. It is truncated or no safetensors file: copy it again"
                )
            header = json.loads(file.read(length))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        end = 8 + length + max((v["data_offsets"][1] for v in entries.values()), default=0)
        found = {
            k: StoredTensor(_HEADER_DTYPES[v["dtype"]], tuple(v["shape"]), 8 + length + v["data_offsets"][0])
            for k, v in entries.items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{path} must hold a safetensors header of floating-point tensors; found {type(error).__name__}: {error}"
        ) from error
    if end != size:
        raise CheckpointError(f"{path} must be {end} bytes long by its own header; found {size}. Copy it again")
    try:  # the library knows of overlaps and of sizes that do not fit their shapes
        safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy the file again") from error
    return found


def save_weights(
    state: Mapping[str, Tensor], config: Model, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write our state as `model-*.safetensors` and their index into `folder`; the names of all files written.

    Each file holds at most `max_shard_bytes` of tensors, or a single larger one. Raises CheckpointError (full disk,
    no permission); the caller gives the folder its final name.
    """
    folder = Path(folder)
    tensors = to_huggingface(state, config)
    shards = list(_shards(tensors, max_shard_bytes))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    weight_map: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            shard = {name: tensors[name].to("cpu").contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in set(weight_map.values()):  # safetensors keeps its files from everybody else; the umask decides
            (folder / file).chmod((folder / INDEX).stat().st_mode)
    except OSError as error:
        raise disk_error(folder, error, total) from error
    except SafetensorError as error:  # carries the message of a full disk, but no errno
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise disk_error(folder, OSError(errno.ENOSPC if full else errno.EIO, str(error)), total) from error
    return [*dict.fromkeys(weight_map.values()), INDEX]


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order."""
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names
