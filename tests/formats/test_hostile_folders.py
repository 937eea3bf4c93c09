"""Hugging Face folders made to do harm: each of them only raises CheckpointError, fast and small."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.load import load_folder, open_weights
from tinylab.model.transformer import Llama

SHAPE = Model(vocab_size=32, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=16, seq_len=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Llama(SHAPE)
    model.init_weights(0)
    save_weights(model.state_dict(), SHAPE, tmp_path / "hf", max_shard_bytes=3000)
    write_config(SHAPE, tmp_path / "hf")
    return tmp_path / "hf"


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors header, keeping the data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first(values: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in values.items() if k != "__metadata__")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        values["weight_map"]["model.norm.weight"] = name
        path.write_text(json.dumps(values))

    return change


def on_shard(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(sorted(folder.glob("*.safetensors"))[0])


def swap_shards(folder: Path) -> None:
    a, b, *_ = sorted(folder.glob("*.safetensors"))
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(one)
    b.write_bytes(one if len(one) != len(two) else two[::-1])


FOLDERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "another architecture": ("found 'mistral'", config(model_type="mistral")),
    "a key nobody knows": ("quantization_config = {'bits': 4} is unknown", config(quantization_config={"bits": 4})),
    "a billion layers": ("must hold the 1000000000 layers", config(num_hidden_layers=10**9)),
    "a trillion words": ("misshaped: model.embed_tokens.weight", config(vocab_size=10**12)),
    "a wrong vocabulary": ("misshaped: model.embed_tokens.weight", config(vocab_size=33)),
    "heads of nothing": ("model.n_head = 0", config(num_attention_heads=0)),
    "text for a number": ("found '16'", config(hidden_size="16")),
    "an unknown rope": ("found 'yarn'", config(rope_scaling={"rope_type": "yarn", "factor": 2.0})),
    "a deep configuration": ("recursion", lambda f: (f / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)),
    "a huge configuration": (
        "at most 1000000 bytes",
        lambda f: (f / "config.json").write_text(json.dumps({"x": "y" * 2_000_000})),
    ),
    "no configuration": ("No such file", lambda f: (f / "config.json").unlink()),
    "an index upwards": ("found '../../../../etc/passwd'", index("../../../../etc/passwd")),
    "an absolute index": ("found '/etc/passwd'", index("/etc/passwd")),
    "an index of a missing file": ("files that are missing", index("model-00009-of-00009.safetensors")),
    "an index of a pickle": ("found 'evil.bin'", index("evil.bin")),
    "an index of numbers": (
        "found 1",
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'),
    ),
    "a deep index": ("recursion", lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000)),
    "a truncated shard": ("bytes long by its own header", on_shard(lambda p: p.write_bytes(p.read_bytes()[:-1]))),
    "a longer shard": ("bytes long by its own header", on_shard(lambda p: p.write_bytes(p.read_bytes() + b"\0"))),
    "an empty shard": ("in a file of 0 bytes", on_shard(lambda p: p.write_bytes(b""))),
    "a header of an exabyte": (
        "found 1152921504606846976",
        on_shard(lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
    ),
    "a header of 90 MB": (
        "found 90000000",
        on_shard(lambda p: p.write_bytes(struct.pack("<Q", 90_000_000) + b" " * 90_000_000)),
    ),
    "a deep header": ("recursion", on_shard(lambda p: p.write_bytes(struct.pack("<Q", 50_000) + b"[" * 50_000))),
    "a shape of a petabyte": ("invalid shape", on_shard(lambda p: header(p, lambda v: first(v).update(shape=[2**50])))),
    "a negative shape": ("integer `-1`", on_shard(lambda p: header(p, lambda v: first(v).update(shape=[-1, -32])))),
    "offsets that overlap": (
        "invalid shape",
        on_shard(lambda p: header(p, lambda v: first(v).update(data_offsets=[0, 4]))),
    ),
    "offsets before the data": (
        "integer `-8`",
        on_shard(lambda p: header(p, lambda v: first(v).update(data_offsets=[-8, 2040]))),
    ),
    "an integer tensor": ("'I32'", on_shard(lambda p: header(p, lambda v: first(v).update(dtype="I32")))),
    "a tensor too many": ("invalid offset", on_shard(lambda p: header(p, lambda v: v.update(evil=dict(first(v)))))),
    "a missing tensor": (
        "invalid offset",
        on_shard(lambda p: header(p, lambda v: v.pop(next(k for k in v if k != "__metadata__")))),
    ),
    "shards swapped": ("found in two files", swap_shards),
    "a configuration of another dtype": (
        "invalid shape",
        on_shard(lambda p: header(p, lambda v: first(v).update(dtype="F64"))),
    ),
}


@pytest.mark.parametrize("load", [load_folder, open_weights])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_hostile_folder_only_raises(folder: Path, kind: str, load: Callable[[Path], Any]):
    assert load(folder)
    reason, change = FOLDERS[kind]
    change(folder)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"hf|config") as caught:
        opened = load(folder)
        if load is open_weights:
            for lazy in opened.tensors.values():
                lazy.load()
    assert reason in str(caught.value)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


class Payload:
    """Pickles as a call of os.system that makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_pickle_beside_safetensors_is_never_read(folder: Path):
    canary = folder / "canary"
    torch.save({"model.norm.weight": Payload(canary)}, folder / "pytorch_model.bin")
    assert load_folder(folder) and open_weights(folder)
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_weights(folder)
    assert not canary.exists()
