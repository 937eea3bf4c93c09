"""One checkpoint written by several ranks: each writes its own rows, and rank 0 joins them into the usual files.

The Hugging Face storage of torch.distributed.checkpoint writes the rows, as safetensors with the offsets of each beside
it; this is the only module that knows its arguments, which differ between releases of torch. The plan is local: what
each rank writes was decided with the snapshot. torch's own consolidation is not used: it fills tensors without
dimensions (AdamW's step counts) with zeros, and leaves out the metadata that transformers asks for (torch 2.13).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from tinylab.checkpoint.snapshot import Piece, Snapshot, optimizer_pieces, weight_pieces
from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface import FILE_METADATA, write_weight_files
from tinylab.model.names import name_map

WEIGHTS, OPTIMIZER = "weights", "optimizer"
_COPY_BYTES = 2**24


def write_parts(folder: Path, rank: int, snapshot: Snapshot, model: Model) -> None:
    """Write the rows of this rank's snapshot below `folder`, which must exist. Raises OSError."""
    for kind, pieces in ((WEIGHTS, weight_pieces(snapshot, model)), (OPTIMIZER, optimizer_pieces(snapshot))):
        (folder / kind).mkdir(exist_ok=True)
        if pieces:
            _write(folder / kind, rank, pieces)


def _write(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            return pieces[write_item.index.fqn].values

    items = []
    for name, piece in pieces.items():
        offsets = torch.Size(piece.offsets)
        chunk = ChunkStorageMetadata(offsets=offsets, sizes=piece.values.size())
        properties = TensorProperties.create_from_tensor(piece.values)
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
        items.append(WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data))
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    writer.write_data(SavePlan(items, storage_data={"shard_index": rank + 1}), Planner()).wait()


class _Rows(NamedTuple):
    """Rows of a tensor in the file of one rank."""

    start: int
    shape: Sequence[int]
    dtype: str
    file: Path
    position: int
    size: int


def join_weights(parts: Path, model: Model, folder: Path) -> None:
    """Make the model's files in `folder` of what every rank wrote. Raises CheckpointError, OSError."""
    rows = _find_rows(parts / WEIGHTS)
    shapes = {part.name: part.shape for pieces in name_map(model).values() for part in pieces}

    def write(path: Path, names: Sequence[str]) -> None:
        _join(path, rows, {name: shapes[name] for name in names}, FILE_METADATA)

    sizes = {name: sum(r.size for r in rows.get(name, ())) for name in shapes}
    write_weight_files(sizes, folder, write)


def join_optimizer(parts: Path, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Make the optimizer's file of what every rank wrote. Raises CheckpointError, OSError."""
    _join(path, _find_rows(parts / OPTIMIZER), shapes, {})


def _find_rows(folder: Path) -> dict[str, list[_Rows]]:
    """What the ranks wrote into `folder`: the rows of each tensor, from the first down."""
    found: dict[str, list[_Rows]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        offsets = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            start = next(iter(offsets[name]["saved_offsets"]), 0)
            rows = _Rows(start, entry["shape"], entry["dtype"], path, 8 + length + begin, end - begin)
            found.setdefault(name, []).append(rows)
    return {name: sorted(rows) for name, rows in found.items()}


def _join(
    target: Path,
    found: Mapping[str, Sequence[_Rows]],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Write the tensors of `shapes` as `safetensors.torch.save_file` would, byte for byte, one block at a time.

    Raises CheckpointError when rows are missing, OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    order = sorted(shapes, key=lambda name: (-_width(found[name][0].dtype) if name in found else 0, name))
    for name in order:
        begin, next_row = end, 0
        for rows in found.get(name, ()):
            if rows.start != next_row:
                break
            next_row += rows.shape[0] if rows.shape else 1
            end += rows.size
        wanted = shapes[name][0] if shapes[name] else 1
        if next_row != wanted:
            raise CheckpointError(
                f"every row of {name} must be written by one rank; of {wanted} rows, {next_row} were found in order. "
                "Every rank must see the same run folder"
            )
        dtype = found[name][0].dtype if name in found else "F32"
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for rows in (rows for name in order for rows in found[name]):
            _copy(rows, out)


def _copy(rows: _Rows, out: IO[bytes]) -> None:
    with open(rows.file, "rb", buffering=0) as file:
        file.seek(rows.position)
        left = rows.size
        while left:
            block = file.read(min(left, _COPY_BYTES))
            if not block:
                raise CheckpointError(f"{rows.file} must hold {left} bytes more; it was cut short")
            out.write(block)
            left -= len(block)


def _width(dtype: str) -> int:
    """Bits of one value: safetensors puts the widest types first."""
    return int("".join(c for c in dtype if c.isdigit()) or 8)
