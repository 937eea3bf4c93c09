"""Pickles made to do harm: each of them only raises CheckpointError, fast and small, and no canary is made."""

from __future__ import annotations

import ast
import os
import pickle
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats import litgpt
from tinylab.formats import safe_pickle as pickles
from tinylab.formats.load import load_folder, load_weights

from .torch_bytes import PROTO, STOP, pack, state, tensor, text

SHAPE = Model(vocab_size=32, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16, seq_len=16)


def call(module: str, name: str, argument: bytes) -> bytes:
    """GLOBAL, one argument, REDUCE."""
    return b"c" + f"{module}\n{name}\n".encode() + argument + b"\x85R"


def laughs() -> bytes:
    """A list of two lists of two lists, 100 levels deep, each level the same object twice."""
    return b"]q\x00" + b"".join(b"0]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 100))


def itself(count: int) -> bytes:
    """Keys that all have memo 0 as their value."""
    return b"".join(text(str(i)) + b"h\x00" for i in range(count))


class Payload:
    """Pickles as a call of os.system that makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def pickled(protocol: int, wrap: Callable[[Any], Any]) -> Callable[[Path], bytes]:
    return lambda canary: pickle.dumps(wrap(Payload(canary)), protocol)


PICKLES: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "os.system by reduce": ("the global posix.system", pickled(2, lambda p: p)),
    "os.system by stack global": ("the global posix.system", pickled(4, lambda p: {"model": p})),
    "os.system in an optimizer": (
        "the global posix.system",
        pickled(5, lambda p: {"model": {}, "optimizer": {"state": {0: [p]}}}),
    ),
    "os.system as text opcodes": ("the global posix.system", pickled(0, lambda p: p)),
    "eval": (
        "the global builtins.eval",
        lambda c: PROTO + call("builtins", "eval", text(f"open({str(c)!r}, 'w')")) + STOP,
    ),
    "exec behind a tensor": (
        "the global builtins.exec",
        lambda c: state(tensor((4,), (1,)) + b"0" + call("builtins", "exec", text("1"))),
    ),
    "inst opcode": ("the opcode INST", lambda c: b"(" + text(f"touch {c}") + b"ios\nsystem\n."),
    "obj opcode": ("the global os.system", lambda c: b"(cos\nsystem\n" + text(f"touch {c}") + b"o."),
    "newobj": (
        "the global subprocess.Popen",
        lambda c: PROTO + b"csubprocess\nPopen\n" + text(f"touch {c}") + b"\x85\x81" + STOP,
    ),
    "allowed class by newobj": ("the opcode NEWOBJ", lambda c: PROTO + b"ccollections\nOrderedDict\n)\x81" + STOP),
    "extension registry": ("the opcode EXT1", lambda c: PROTO + b"\x82\x01" + STOP),
    "dotted name": ("the global torch.hub.load", lambda c: PROTO + call("torch", "hub.load", text("x/y")) + STOP),
    "torch.load inside": ("the global torch.load", lambda c: PROTO + call("torch", "load", text(str(c))) + STOP),
    "getattr chain": (
        "the global builtins.getattr",
        lambda c: PROTO + b"cbuiltins\ngetattr\n" + b"ctorch\nFloatStorage\n" + text("x") + b"\x86R" + STOP,
    ),
    "a storage class called": (
        "a call of a torch storage class",
        lambda c: PROTO + call("torch", "FloatStorage", b"\x8a\x05\x00\x00\x00\x00\x7f") + STOP,
    ),
    "attributes of a list": ("attributes set on a list", lambda c: PROTO + b"]}b" + STOP),
    "a call of text": ("a call of a str", lambda c: PROTO + text("system") + b")R" + STOP),
    "ordered dictionary of nothing good": (
        "an OrderedDict made from arguments",
        lambda c: PROTO + call("collections", "OrderedDict", b"K\x01") + STOP,
    ),
    "a rebuilt tensor of text": (
        "a broken one (not enough values",
        lambda c: state(call("torch._utils", "_rebuild_tensor_v2", text("x"))),
    ),
    "a parameter of a number": (
        "a parameter that holds no tensor",
        lambda c: state(call("torch._utils", "_rebuild_parameter", b"K\x01")),
    ),
    "persistent id that is a path": (
        "a persistent identifier other than a torch storage",
        lambda c: PROTO + text("/etc/passwd") + b"Q" + STOP,
    ),
    "storage of another archive": ("must hold data/../../0", lambda c: state(tensor((4,), (1,), key="../../0"))),
    "storage that is absent": ("must hold data/7", lambda c: state(tensor((4,), (1,), key="7"))),
    "storage of a petabyte": (
        "must hold 1125899906842624 values",
        lambda c: state(tensor((2**50,), (1,), numel=2**50)),
    ),
    "shape beyond the storage": ("must be inside its storage", lambda c: state(tensor((5,), (1,)))),
    "offset beyond the storage": ("must be inside its storage", lambda c: state(tensor((4,), (1,), offset=1))),
    "strides beyond the storage": ("must be inside its storage", lambda c: state(tensor((2, 2), (9, 1)))),
    "negative offset": ("a malformed tensor", lambda c: state(tensor((4,), (1,), offset=-8))),
    "negative stride": ("a malformed shape", lambda c: state(tensor((4,), (-1,)))),
    "negative shape": ("a malformed shape", lambda c: state(tensor((-4,), (1,)))),
    "expanded to a terabyte": ("must be inside its storage", lambda c: state(tensor((2**40,), (0,)))),
    "product that wraps around": ("must be inside its storage", lambda c: state(tensor((2**32, 2**32), (1, 1)))),
    "more strides than sizes": ("a malformed tensor", lambda c: state(tensor((4,), (1, 1)))),
    "memo at two billion": ("an empty stack", lambda c: PROTO + b"]r\xff\xff\xff\x7f0j\xff\xff\xff\x7fR" + STOP),
    "text of an exabyte": ("but only 2 remain", lambda c: PROTO + b"\x8d" + struct.pack("<Q", 2**60) + b"x" + STOP),
    "nested very deep": ("found no tensors", lambda c: PROTO + b")" + b"\x85" * 250_000 + STOP),
    "deep tuple as a key": (
        "a dictionary key of type tuple",
        lambda c: PROTO + b"})" + b"\x85" * 250_000 + b"K\x01s" + STOP,
    ),
    "a billion laughs": ("found no tensors", lambda c: PROTO + laughs() + STOP),
    "a dictionary that holds itself": ("found no tensors", lambda c: PROTO + b"}q\x00(" + itself(10_000) + b"u" + STOP),
    "millions of opcodes": ("at most 300000 opcodes", lambda c: PROTO + b"]0" * 2_000_000 + b"]" + STOP),
    "larger than any state dict": ("at most 16777216 bytes", lambda c: PROTO + b"N0" * (9 * 2**20) + b"N" + STOP),
    "no end": ("exhausted before seeing STOP", lambda c: PROTO + b"}"),
    "two pickles": ("bytes more", lambda c: state(tensor((4,), (1,))) + pickle.dumps(Payload(c))),
    "nothing on the stack": ("pop from empty list", lambda c: PROTO + b"0R" + STOP),
    "empty": ("exhausted before seeing STOP", lambda c: b""),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_hostile_pickle_only_raises(tmp_path: Path, kind: str):
    reason, make = PICKLES[kind]
    canary = tmp_path / "canary"
    path = pack(tmp_path / "m.pth", make(canary))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"m\.pth") as caught:
        load_weights(litgpt.open_checkpoint(path, SHAPE))
    assert reason in str(caught.value)  # not another wall behind the one that is meant
    assert not canary.exists()
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


def test_the_message_names_what_was_found_and_what_to_do(tmp_path: Path):
    path = pack(tmp_path / "m.pth", PICKLES["os.system by reduce"][1](tmp_path / "canary"))
    with pytest.raises(
        CheckpointError, match=r"found the global posix\.system.*nothing of it was executed.*safetensors"
    ):
        load_folder(path)


@pytest.mark.parametrize("where", ["archive", "yaml"])
def test_a_configuration_that_would_fill_the_memory_is_not_spelled_out(tmp_path: Path, where: str):
    path = tmp_path / "lit_model.pth"
    config = text("config") + b"}" + text("n_embd") + laughs() + b"s" if where == "archive" else b""
    weights = b"}" + text("transformer.wte.weight") + tensor((4,), (1,)) + b"s"
    pack(path, PROTO + b"}(" + text("model") + weights + config + b"u" + STOP)
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 100)), "n_embd: *a99"]
    (tmp_path / "model_config.yaml").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="n_embd must be a whole number; found") as caught:
        load_folder(path)
    assert len(str(caught.value)) < 1000


def test_forced_unsafe_loading_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    path = pack(tmp_path / "m.pth", PICKLES["os.system by reduce"][1](canary))
    with pytest.raises(CheckpointError):
        load_folder(path)
    assert not canary.exists()


def test_the_reader_of_pickles_has_nothing_to_call():
    """The wall behind the allow-list: names in a file stay names, since nothing here could look one up."""
    tree = ast.parse(Path(pickles.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "pickletools", "typing", "tinylab.errors"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "eval", "exec", "compile", "globals", "open", "__builtins__", "getattr"}


def test_no_module_of_the_package_unpickles():
    package = Path(litgpt.__file__).parents[1]
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for banned in ("torch.load(", "pickle.load", "Unpickler", "np.load(", "joblib", "import pickle\n"):
            if banned in source and not (banned == "torch.load(" and path.name == "torch_archive.py"):  # in its advice
                pytest.fail(f"{path.name} has {banned}")
