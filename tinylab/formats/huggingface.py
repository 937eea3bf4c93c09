"""Hugging Face's Llama folder, both ways: config.json, the weights, and the weight map that says which file has which.

A folder is never trusted: nothing is unpickled, the configuration must describe a Llama that tinylab computes exactly,
file names in a weight map stay inside the folder, and every header is checked before a tensor is read.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface_config import model_from_config
from tinylab.formats.tensors import LazyTensor, Weights
from tinylab.formats.torch_archive import TorchArchive
from tinylab.formats.weight_map import INDEX, PICKLED, SAFETENSORS, has_weights, weight_files
from tinylab.model.names import to_huggingface
from tinylab.runs.durable import disk_error

MAX_HEADER_BYTES = 10_000_000
MAX_SHARD_BYTES = 5_000_000_000
FILE_METADATA = {"format": "pt"}
"""What transformers asks of a safetensors file."""
_HEADER_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_folder(folder: Path) -> Weights:
    """The weights of a folder, opened but not read: safetensors, or `.bin` files where there are no safetensors.

    Raises CheckpointError for a folder that is incomplete, damaged or hostile, and for a tensor that two files have.
    """
    model = model_from_config(folder / "config.json")
    if has_weights(folder, PICKLED) and not has_weights(folder, SAFETENSORS):
        archives = [TorchArchive(folder / file) for file in weight_files(folder, PICKLED)]
        parts = [archive.tensors(archive.value) for archive in archives]
    else:
        parts = [read_header(folder / file) for file in weight_files(folder)]
    twice = [name for name, count in Counter(name for part in parts for name in part).items() if count > 1]
    if twice:
        raise CheckpointError(
            f"{folder} must hold every tensor once; found in two files: {', '.join(twice[:20])}. Download it again"
        )
    return Weights(model, {name: tensor for part in parts for name, tensor in part.items()}, str(folder))


def read_header(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a safetensors file, from its header alone; safetensors itself has checked the header too.

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
        start = 8 + length
        end = start + max((v["data_offsets"][1] for v in entries.values()), default=0)
        found = {
            k: LazyTensor.stored(path, start + v["data_offsets"][0], tuple(v["shape"]), _HEADER_DTYPES[v["dtype"]])
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
    try:  # the library sees overlaps, and sizes that do not fit their shapes
        safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy the file again") from error
    return found


def save_weights(
    state: Mapping[str, Tensor], config: Model, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write our state as `model-*.safetensors` and their weight map into `folder`; the names of all files written.

    Raises as `write_weight_files` does; giving the folder its final name is up to the caller.
    """
    tensors = to_huggingface(state, config)

    def write(path: Path, names: list[str]) -> None:
        save_file({name: tensors[name].to("cpu").contiguous() for name in names}, path, metadata=FILE_METADATA)

    return write_weight_files({name: t.nbytes for name, t in tensors.items()}, folder, write, max_shard_bytes)


def write_weight_files(
    sizes: Mapping[str, int],
    folder: str | Path,
    write: Callable[[Path, list[str]], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Have `write` make each `model-*.safetensors` from the names of its tensors, and write their weight map.

    `sizes` are the bytes of each tensor, under Hugging Face's names and in the order of the model. Each file holds at
    most `max_shard_bytes` of tensors, or a single larger one. Raises CheckpointError (full disk, no permission).
    """
    folder = Path(folder)
    shards = list(_shards(sizes, max_shard_bytes))
    total = sum(sizes.values())
    weight_map: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write(folder / file, names)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file in set(weight_map.values()):  # safetensors makes its files private; the umask decides
            (folder / file).chmod((folder / INDEX).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise disk_error(folder, error, total) from error
    return [*dict.fromkeys(weight_map.values()), INDEX]


def _shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names
