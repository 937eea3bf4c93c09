"""Archives made to do harm: each of them only raises CheckpointError, fast, and no damage is silent."""

from __future__ import annotations

import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats import litgpt
from tinylab.formats.load import load_folder
from tinylab.formats.torch_archive import TorchArchive
from tinylab.model.transformer import Llama

from .torch_bytes import pack, state, tensor

SHAPE = Model(vocab_size=32, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16, seq_len=16)


def good(path: Path) -> Path:
    model = Llama(SHAPE)
    model.init_weights(0)
    litgpt.save_pth(model, path)
    return path


def rewritten(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    """The archive once more, member by member through `change`."""
    with zipfile.ZipFile(path) as old:
        members = [(i.filename, old.read(i)) for i in old.infolist()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        warnings.simplefilter("ignore")
        for name, content in members:
            change(new, name, content)


def bomb(path: Path) -> None:
    rewritten(path, lambda new, name, content: new.writestr(name, content, zipfile.ZIP_DEFLATED))


def twice(path: Path) -> None:
    def write(new: zipfile.ZipFile, name: str, content: bytes) -> None:
        new.writestr(name, content)
        if name.endswith("data/0"):
            new.writestr(name, content)

    rewritten(path, write)


def renamed(to: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        rewritten(path, lambda new, name, content: new.writestr(to if name.endswith("/version") else name, content))

    return change


def many(path: Path) -> None:
    rewritten(path, lambda new, name, content: new.writestr(name, content))
    with zipfile.ZipFile(path, "a") as file:
        for i in range(20_100):
            file.writestr(f"m/data/x{i}", b"")


def inside(path: Path) -> None:
    """The bytes of one member hold another with its own header, as in a quoted bomb."""
    names = ("archive/data/x", "archive/data/y")
    with zipfile.ZipFile(path, "a") as file:
        for name, size in zip(names, (64, 1), strict=True):
            file.writestr(name, bytes(size))
        x, y = (file.getinfo(name).header_offset for name in names)
    data, header = bytearray(path.read_bytes()), 30 + len(names[0])
    data[x + header : x + 2 * header + 1] = data[y : y + header + 1]
    entry = data.rfind(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = struct.pack("<I", x + header)
    path.write_bytes(data)


def at_the_first(path: Path) -> None:
    """Every entry of the directory points at the first member."""
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 42 : at + 46] = bytes(4)
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)


def longer_members(path: Path) -> None:
    """The directory claims a gigabyte for each member."""
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 20 : at + 28] = struct.pack("<II", 2**30, 2**30)
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{zipfile.ZipFile(path).namelist()[0].split('/')[0]}/code/__torch__.py", b"def forward(): pass")


def other_endian(path: Path) -> None:
    rewritten(path, lambda new, name, c: new.writestr(name, b"big" if name.endswith("byteorder") else c))


def directory_bomb(path: Path) -> None:
    """Both end records claim a directory of 4 GB minus two, in a file that is that long, if with holes."""
    data = bytearray(path.read_bytes())
    size = 2**32 - 2
    at = data.rfind(b"PK\x06\x06")
    data[at + 40 : at + 48] = struct.pack("<Q", size)
    end = data.rfind(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", size)
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(data[at:])


ARCHIVES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "compressed members": ("stored without compression", bomb),
    "the same member twice": ("must hold data/0 once", twice),
    "a path upwards": ("below one top folder", renamed("m/../../../../tmp/evil")),
    "an absolute path": ("below one top folder", renamed("/etc/evil")),
    "a backslash": ("below one top folder", renamed("m/..\\evil")),
    "a drive": ("below one top folder", renamed("m/C:evil")),
    "a second top folder": ("one folder with data.pkl; found archive, n", renamed("n/version")),
    "no data.pkl": (
        "one folder with data.pkl",
        lambda p: rewritten(
            p, lambda new, name, c: new.writestr(name.replace("data.pkl", "x.pkl"), c) if "/data" in name else None
        ),
    ),
    "too many members": ("found 20115", many),
    "one member inside another": ("overlap no other member", inside),
    "members of another name": ("must begin with its own header", at_the_first),
    "members longer than the file": ("must be inside the file", longer_members),
    "a directory larger than the file": ("its directory must be at most", directory_bomb),
    "a program": ("a TorchScript program", script),
    "another byte order": ("little-endian", other_endian),
    "an empty file": ("begins with b''", lambda p: p.write_bytes(b"")),
    "no zip": ("begins with b'GIF8'", lambda p: p.write_bytes(b"GIF89a" + bytes(100))),
    "a bare pickle": ("found a bare pickle", lambda p: p.write_bytes(pickle.dumps({"a": 1}))),
    "zeros at the end": ("must be a complete torch archive", lambda p: p.write_bytes(p.read_bytes() + bytes(70_000))),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_only_raises(tmp_path: Path, kind: str):
    path = good(tmp_path / "m.pth")
    reason, change = ARCHIVES[kind]
    change(path)
    start, before = time.monotonic(), sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"m\.pth") as caught:
        load_folder(path)
    assert reason in str(caught.value)
    assert time.monotonic() - start < 5 and sorted(tmp_path.iterdir()) == before


def test_a_legacy_file_says_how_to_convert_it(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"found a bare pickle.*convert it where it came from: torch\.save"):
        load_folder(tmp_path / "m.pth")


def test_a_real_bomb_is_not_unpacked(tmp_path: Path):
    path = pack(
        tmp_path / "m.pth", state(tensor((4,), (1,))), {"archive/data/0": bytes(64 * 2**20)}, zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="must be stored without compression"):
        TorchArchive(path)


def test_no_cut_and_no_flipped_bit_is_silent(tmp_path: Path):
    path = good(tmp_path / "m.pth")
    data, model = path.read_bytes(), load_folder(path)
    draw = random.Random(0)
    for _ in range(60):
        path.write_bytes(data[: draw.randrange(len(data))])
        with pytest.raises(CheckpointError):
            load_folder(path)
    for _ in range(200):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = load_folder(path)
        except CheckpointError:
            continue
        assert loaded.config == model.config  # a bit of padding or of a timestamp: the same model, or an error
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
