"""Archives made to do harm: each of them only raises CheckpointError, fast and small, and no canary is made."""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.checkpoint import litgpt
from tinylab.checkpoint.torchzip import TorchArchive
from tinylab.config.schema import Model
from tinylab.errors import CheckpointError
from tinylab.model.transformer import Llama

SHAPE = Model(vocab_size=32, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16, seq_len=16)
PROTO, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, argument: bytes) -> bytes:
    """GLOBAL, one argument, REDUCE."""
    return b"c" + f"{module}\n{name}\n".encode() + argument + b"\x85R"


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


class Payload:
    """Pickles as a call of os.system that makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(protocol: int, wrap: Callable[[Any], Any]) -> Callable[[Path], bytes]:
    return lambda canary: pickle.dumps(wrap(Payload(canary)), protocol)


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system by reduce": pickled(2, lambda p: p),
    "os.system by stack global": pickled(4, lambda p: {"model": p}),
    "os.system in an optimizer": pickled(5, lambda p: {"model": {}, "optimizer": {"state": {0: [p]}}}),
    "os.system as text opcodes": pickled(0, lambda p: p),
    "eval": lambda c: PROTO + call("builtins", "eval", text(f"open({str(c)!r}, 'w')")) + STOP,
    "exec behind a tensor": lambda c: state(tensor((4,), (1,)) + b"0" + call("builtins", "exec", text("1"))),
    "inst opcode": lambda c: b"(" + text(f"touch {c}") + b"ios\nsystem\n.",
    "obj opcode": lambda c: b"(cos\nsystem\n" + text(f"touch {c}") + b"o.",
    "newobj": lambda c: PROTO + b"csubprocess\nPopen\n" + text(f"touch {c}") + b"\x85\x81" + STOP,
    "allowed class by newobj": lambda c: PROTO + b"ccollections\nOrderedDict\n)\x81" + STOP,
    "extension registry": lambda c: PROTO + b"\x82\x01" + STOP,
    "dotted name": lambda c: PROTO + call("torch", "hub.load", text("x/y")) + STOP,
    "torch.load inside": lambda c: PROTO + call("torch", "load", text(str(c))) + STOP,
    "getattr chain": lambda c: (
        PROTO + b"cbuiltins\ngetattr\n" + b"ctorch\nFloatStorage\n" + text("x") + b"\x86R" + STOP
    ),
    "a storage class called": lambda c: PROTO + call("torch", "FloatStorage", b"\x8a\x05\x00\x00\x00\x00\x7f") + STOP,
    "attributes of a list": lambda c: PROTO + b"]}b" + STOP,
    "a call of text": lambda c: PROTO + text("system") + b")R" + STOP,
    "ordered dictionary of nothing good": lambda c: PROTO + call("collections", "OrderedDict", b"K\x01") + STOP,
    "a rebuilt tensor of text": lambda c: state(call("torch._utils", "_rebuild_tensor_v2", text("x"))),
    "a parameter of a number": lambda c: state(call("torch._utils", "_rebuild_parameter", b"K\x01")),
    "persistent id that is a path": lambda c: PROTO + text("/etc/passwd") + b"Q" + STOP,
    "storage of another archive": lambda c: state(tensor((4,), (1,), key="../../0")),
    "storage that is absent": lambda c: state(tensor((4,), (1,), key="7")),
    "storage of a petabyte": lambda c: state(tensor((2**50,), (1,), numel=2**50)),
    "shape beyond the storage": lambda c: state(tensor((5,), (1,))),
    "offset beyond the storage": lambda c: state(tensor((4,), (1,), offset=1)),
    "strides beyond the storage": lambda c: state(tensor((2, 2), (9, 1))),
    "negative offset": lambda c: state(tensor((4,), (1,), offset=-8)),
    "negative stride": lambda c: state(tensor((4,), (-1,))),
    "negative shape": lambda c: state(tensor((-4,), (1,))),
    "expanded to a terabyte": lambda c: state(tensor((2**40,), (0,))),
    "product that wraps around": lambda c: state(tensor((2**32, 2**32), (1, 1))),
    "more strides than sizes": lambda c: state(tensor((4,), (1, 1))),
    "memo at two billion": lambda c: PROTO + b"]r\xff\xff\xff\x7f0j\xff\xff\xff\x7fR" + STOP,
    "text of an exabyte": lambda c: PROTO + b"\x8d" + struct.pack("<Q", 2**60) + b"x" + STOP,
    "nested very deep": lambda c: PROTO + b")" + b"\x85" * 250_000 + STOP,
    "deep tuple as a key": lambda c: PROTO + b"})" + b"\x85" * 250_000 + b"K\x01s" + STOP,
    "a billion laughs": lambda c: PROTO + b"]q\x00" + b"(h\x00h\x00e" * 100_000 + STOP,
    "millions of opcodes": lambda c: PROTO + b"]0" * 2_000_000 + b"]" + STOP,
    "larger than any state dict": lambda c: PROTO + b"N0" * (9 * 2**20) + b"N" + STOP,
    "no end": lambda c: PROTO + b"}",
    "two pickles": lambda c: state(tensor((4,), (1,))) + pickle.dumps(Payload(c)),
    "nothing on the stack": lambda c: PROTO + b"0R" + STOP,
    "empty": lambda c: b"",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_hostile_pickle_only_raises(tmp_path: Path, kind: str):
    canary = tmp_path / "canary"
    path = pack(tmp_path / "m.pth", PICKLES[kind](canary))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"m\.pth"):
        litgpt.load(path, model=SHAPE)
    assert not canary.exists()
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


def test_the_message_names_what_was_found_and_what_to_do(tmp_path: Path):
    path = pack(tmp_path / "m.pth", PICKLES["os.system by reduce"](tmp_path / "canary"))
    with pytest.raises(
        CheckpointError, match=r"found the global posix\.system.*nothing of it was executed.*safetensors"
    ):
        litgpt.load(path)


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
        rewritten(path, lambda new, name, content: new.writestr(to if name.endswith("version") else name, content))

    return change


def many(path: Path) -> None:
    rewritten(path, lambda new, name, content: new.writestr(name, content))
    with zipfile.ZipFile(path, "a") as file:
        for i in range(20_100):
            file.writestr(f"m/data/x{i}", b"")


def overlapping(path: Path) -> None:
    """Every entry of the directory points at the first member, as in a quoted bomb."""
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
        file.truncate(size)
        file.seek(size)
        file.write(data[at:])


ARCHIVES: dict[str, Callable[[Path], Any]] = {
    "compressed members": bomb,
    "the same member twice": twice,
    "a path upwards": renamed("m/../../../../tmp/evil"),
    "an absolute path": renamed("/etc/evil"),
    "a backslash": renamed("m/..\\evil"),
    "a drive": renamed("m/C:evil"),
    "a second top folder": renamed("n/data.pkl"),
    "no data.pkl": lambda p: rewritten(
        p, lambda new, name, c: new.writestr(name.replace("data.pkl", "x.pkl"), c) if "/data" in name else None
    ),
    "too many members": many,
    "overlapping members": overlapping,
    "members longer than the file": longer_members,
    "a directory larger than the file": directory_bomb,
    "a program": script,
    "another byte order": other_endian,
    "an empty file": lambda p: p.write_bytes(b""),
    "no zip": lambda p: p.write_bytes(b"GIF89a" + bytes(100)),
    "a bare pickle": lambda p: p.write_bytes(pickle.dumps({"a": 1})),
    "zeros at the end": lambda p: p.write_bytes(p.read_bytes() + bytes(70_000)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_archive_only_raises(tmp_path: Path, kind: str):
    path = good(tmp_path / "m.pth")
    ARCHIVES[kind](path)
    start, before = time.monotonic(), sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"m\.pth"):
        litgpt.load(path)
    assert time.monotonic() - start < 5 and sorted(tmp_path.iterdir()) == before


def test_a_legacy_file_says_how_to_convert_it(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"found a bare pickle.*convert it where it came from: torch\.save"):
        litgpt.load(tmp_path / "m.pth")


def test_a_real_bomb_is_not_unpacked(tmp_path: Path):
    path = pack(
        tmp_path / "m.pth", state(tensor((4,), (1,))), {"archive/data/0": bytes(64 * 2**20)}, zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="must be stored without compression"):
        TorchArchive(path)


def test_no_cut_and_no_flipped_bit_is_silent(tmp_path: Path):
    path = good(tmp_path / "m.pth")
    data, model = path.read_bytes(), litgpt.load(path)
    draw = random.Random(0)
    for _ in range(60):
        path.write_bytes(data[: draw.randrange(len(data))])
        with pytest.raises(CheckpointError):
            litgpt.load(path)
    for _ in range(200):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = litgpt.load(path)
        except CheckpointError:
            continue
        assert loaded.config == model.config  # a bit of padding or of a timestamp: the same model, or an error
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_forced_unsafe_loading_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    path = pack(tmp_path / "m.pth", PICKLES["os.system by reduce"](canary))
    with pytest.raises(CheckpointError):
        litgpt.load(path)
    assert not canary.exists()


def test_no_module_of_the_package_unpickles():
    package = Path(litgpt.__file__).parents[1]
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for banned in ("torch.load(", "pickle.load", "Unpickler", "np.load(", "joblib", "import pickle\n"):
            if banned in source and not (banned == "torch.load(" and path.name == "torchzip.py"):  # in its advice
                pytest.fail(f"{path.name} has {banned}")
