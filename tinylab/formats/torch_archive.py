"""Open torch's zip archives (`.pth`, `.bin`): tensors by name, read one at a time, and nothing is executed.

An archive must be as torch.save writes it: one top folder with `data.pkl` and storages `data/KEY`, each member once,
uncompressed, inside the file and overlapping no other. Reading one therefore never takes more memory than its file.
"""

import io
import math
import os
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylab.errors import CheckpointError
from tinylab.formats import safe_pickle as pickles
from tinylab.formats.tensors import LazyTensor, read_values

MAX_MEMBERS = 20_000
"""TinyLlama's checkpoint, with its optimizer, has about 600."""
MAX_DIRECTORY_BYTES = 4 * 2**20
_LOCAL = struct.Struct("<4s5H3I2H")
_CHUNK = 2**20


class _Member(NamedTuple):
    """A file in the archive: where its bytes begin, how many there are, their CRC-32."""

    start: int
    size: int
    crc: int


class _CappedFile(io.FileIO):
    """A file that limits how much is read at once: zipfile reads a whole directory in one call, whatever its size."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY_BYTES:
            raise CheckpointError(f"its directory must be at most {MAX_DIRECTORY_BYTES} bytes; found {wanted}")
        return super().read(wanted)


class TorchArchive:
    """An opened `.pth` or `.bin`: `.value` is the saved object, a TensorSpec in each tensor's place."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._members = _read_directory(self.path)
        self._verified: set[str] = set()
        size = self._members["data.pkl"].size
        if size > pickles.MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{self.path}: data.pkl must be at most {pickles.MAX_PICKLE_BYTES} bytes; found {size}"
            )
        self.value = pickles.read(self._read("data.pkl", 0, size).numpy().tobytes(), f"{self.path}: data.pkl")

    def tensors(self, state: Any) -> dict[str, LazyTensor]:
        """The tensors directly in `state`, a state dict of this archive; none if it is something else.

        Nested values are not followed: a dictionary that holds itself would never end.
        """
        if not isinstance(state, dict):
            return {}
        return {str(k): self._lazy(v) for k, v in state.items() if isinstance(v, pickles.TensorSpec)}

    def _lazy(self, spec: pickles.TensorSpec) -> LazyTensor:
        """One tensor, after a check of every number in its description against the archive."""
        storage, dtype = spec.storage, getattr(torch, spec.storage.dtype)
        member = self._members.get(f"data/{storage.key}")
        if member is None:
            raise CheckpointError(f"{self.path} must hold data/{storage.key}; found none: copy the file again")
        if member.size != storage.numel * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: data/{storage.key} must hold {storage.numel} values of {storage.dtype}; "
                f"found {member.size} bytes"
            )
        numel = math.prod(spec.shape)
        last = sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True)) if numel else -1
        if numel > storage.numel or spec.offset + last >= max(storage.numel, 1):
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(spec.shape)}, strides {list(spec.stride)} and offset "
                f"{spec.offset} must be inside its storage data/{storage.key} of {storage.numel} values"
            )

        def load() -> Tensor:
            raw = self._read(f"data/{storage.key}", spec.offset * dtype.itemsize, (last + 1) * dtype.itemsize)
            return raw.view(dtype).as_strided(spec.shape, spec.stride)

        return LazyTensor(spec.shape, dtype, load, f"{self.path}:{storage.key}:{spec.offset}:{spec.stride}")

    def _read(self, name: str, offset: int, count: int) -> Tensor:
        """Bytes of a member as uint8. Its first reading compares all of the member with its CRC-32."""
        member = self._members[name]
        raw = torch.empty(count, dtype=torch.uint8)
        read_values(self.path, member.start + offset, raw)
        if name not in self._verified:
            crc = zlib.crc32(raw.numpy().data) if count == member.size else 0
            block = torch.empty(_CHUNK, dtype=torch.uint8)
            for at in range(0, member.size if count < member.size else 0, _CHUNK):
                read_values(self.path, member.start + at, part := block[: member.size - at])
                crc = zlib.crc32(part.numpy().data, crc)
            if crc != member.crc:
                raise CheckpointError(
                    f"{self.path}: {name} must have the CRC-32 {member.crc:08x}; found {crc:08x}: it is damaged, copy "
                    "the file again"
                )
        self._verified.add(name)
        return raw


def _read_directory(path: Path) -> dict[str, _Member]:
    """Members by name below the top folder. Raises CheckpointError for whatever torch.save would not write."""
    try:
        with _CappedFile(path) as file:
            magic = file.read(4)
            if magic[:2] != b"PK":
                raise CheckpointError(_what_else(path, magic))
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            return _members(path, file, infos)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(f"{path} must be a complete torch archive; found: {error}. Copy it again") from None


def _members(path: Path, file: io.FileIO, infos: list[zipfile.ZipInfo]) -> dict[str, _Member]:
    size = os.fstat(file.fileno()).st_size
    if not 0 < len(infos) <= MAX_MEMBERS:
        raise CheckpointError(f"{path} must have 1 to {MAX_MEMBERS} members; found {len(infos)}")
    members: dict[str, _Member] = {}
    tops, end = set(), 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        name = info.filename
        parts = PurePosixPath(name).parts
        plain = name == info.orig_filename and re.fullmatch(r"[^\\\x00-\x1f:]{1,400}", name)
        if len(parts) < 2 or ".." in parts or name.startswith("/") or not plain:
            raise CheckpointError(f"{path} must have members below one top folder; found {name[:200]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"{path}: {name} must be stored without compression, as torch.save writes it; found "
                f"{info.compress_size} bytes for {info.file_size}. Unpack the archive and pack it with `zip -0`"
            )
        if info.flag_bits & 1:
            raise CheckpointError(f"{path}: {name} must not be encrypted")
        start = _data_start(path, file, info)
        if info.header_offset < end or start + info.file_size > size:
            raise CheckpointError(
                f"{path}: {name} must be inside the file and overlap no other member; the file is damaged or hostile"
            )
        end = start + info.file_size
        tops.add(parts[0])
        short = "/".join(parts[1:])
        if short in members:
            raise CheckpointError(f"{path} must hold {short} once; found it twice. The file is damaged or hostile")
        members[short] = _Member(start, info.file_size, info.CRC)
    if len(tops) != 1 or "data.pkl" not in members:
        raise CheckpointError(
            f"{path} must be an archive of torch.save, one folder with data.pkl; found {', '.join(sorted(tops)[:5])}"
        )
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise CheckpointError(f"{path} must hold tensors; found a TorchScript program. Export its state dict instead")
    order = members.get("byteorder")
    if order is not None and order.size <= 16:
        file.seek(order.start)
        if file.read(order.size) != sys.byteorder.encode():
            raise CheckpointError(f"{path} must be written in {sys.byteorder}-endian byte order; found the other one")
    return members


def _data_start(path: Path, file: io.FileIO, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin; the local header must name the same member as the directory."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    magic, *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
    name = file.read(name_bytes)
    if magic != b"PK\x03\x04" or name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise CheckpointError(f"{path}: {info.filename} must begin with its own header; the file is damaged or hostile")
    return info.header_offset + _LOCAL.size + name_bytes + extra_bytes


def _what_else(path: Path, magic: bytes) -> str:
    if magic[:1] == b"\x80":
        return (
            f"{path} must be a zip archive as torch.save writes since 1.6; found a bare pickle, which can run any "
            "code. If you trust it, convert it where it came from: torch.save(torch.load(f, weights_only=True), f)"
        )
    return f"{path} must be a zip archive as torch.save writes it; found a file that begins with {magic!r}"
