"""Pickles and archives as torch.save writes them, put together opcode by opcode."""

from __future__ import annotations

import struct
import warnings
import zipfile
from pathlib import Path

PROTO, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0", numel: int = 4) -> bytes:
    """What torch.save writes for one fp32 tensor."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x0a" + v.to_bytes(10, "little", signed=True) for v in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + numbers((numel,))[1:-1] + b"tQ"
    )
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + numbers((offset,))[1:-1]
        + numbers(shape)
        + numbers(stride)
        + hooks
        + b"tR"
    )


def state(value: bytes) -> bytes:
    """A pickled {"transformer.wte.weight": value}."""
    return PROTO + b"}" + text("transformer.wte.weight") + value + b"s" + STOP


def pack(path: Path, data: bytes, more: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    members = {"archive/data.pkl": data, "archive/version": b"3\n", "archive/data/0": bytes(16)} | (more or {})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
        warnings.simplefilter("ignore")
        for name, content in members.items():
            file.writestr(name, content)
    return path
