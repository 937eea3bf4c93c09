"""llama2.c files, written here by an independent writer, against an independent forward pass in its convention."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylab.errors import CheckpointError
from tinylab.formats.load import load_folder

DIM, HIDDEN, LAYERS, VOCAB, CONTEXT = 32, 48, 2, 40, 24


def random_weights(heads: int, kv_heads: int, shared: bool) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, around: float = 0.0) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * 0.2 + around for _ in range(LAYERS)]

    size = DIM // heads
    weights = {
        "an": draw(DIM, around=1.0),
        "fn": draw(DIM, around=1.0),
        "wq": draw(heads * size, DIM),
        "wk": draw(kv_heads * size, DIM),
        "wv": draw(kv_heads * size, DIM),
        "wo": draw(DIM, heads * size),
        "w1": draw(HIDDEN, DIM),
        "w2": draw(DIM, HIDDEN),
        "w3": draw(HIDDEN, DIM),
        "norm": draw(DIM, around=1.0)[:1],
        "embed": draw(VOCAB, DIM)[:1],
        "output": draw(VOCAB, DIM)[:1],
    }
    return weights | {"output": weights["embed"]} if shared else weights


def write(path: Path, weights: dict[str, list[Tensor]], heads: int, kv_heads: int, shared: bool, version: int) -> None:
    """The layout of karpathy/llama2.c:export.py, legacy_export and version1_export, spelled out once more."""
    sizes = [DIM, HIDDEN, LAYERS, heads, kv_heads, VOCAB, CONTEXT]
    if version == 0:
        sizes[5] = VOCAB if shared else -VOCAB
        head = struct.pack("iiiiiii", *sizes)
        order = ["embed", "an", "wq", "wk", "wv", "wo", "fn", "w1", "w2", "w3", "norm", "cos", "sin", "output"]
    else:
        head = struct.pack("Ii7iB", 0x616B3432, version, *sizes, shared).ljust(256, b"\0")
        order = ["an", "fn", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]
    angles = rope_angles(CONTEXT, DIM // heads)
    tensors = weights | {"cos": [angles.cos()], "sin": [angles.sin()]}
    with open(path, "wb") as file:
        file.write(head)
        for kind in order[: -1 if shared else None]:
            for tensor in tensors[kind]:
                file.write(struct.pack(f"{tensor.numel()}f", *tensor.flatten().tolist()))


def rope_angles(length: int, size: int) -> Tensor:
    return torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, size, 2).float() / size))


def reference_logits(ids: Tensor, weights: dict[str, list[Tensor]], heads: int, kv_heads: int) -> Tensor:
    """llama2.c's transformer for one sequence (T,): complex rotation of neighbouring pairs, head by head."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    T, size = len(ids), DIM // heads
    turn = torch.polar(torch.ones(T, size // 2), rope_angles(T, size))
    mask = torch.full((T, T), -torch.inf).triu(1)

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(T, size // 2, 2)) * turn).flatten(1)

    x = weights["embed"][0][ids]
    for i in range(LAYERS):
        h = norm(x, weights["an"][i])
        q, k, v = (h @ weights[name][i].T for name in ("wq", "wk", "wv"))
        out = []
        for head in range(heads):
            other = head // (heads // kv_heads)
            mine, theirs = slice(head * size, (head + 1) * size), slice(other * size, (other + 1) * size)
            scores = rotated(q[:, mine]) @ rotated(k[:, theirs]).T / size**0.5 + mask
            out.append(scores.softmax(-1) @ v[:, theirs])
        x = x + torch.cat(out, -1) @ weights["wo"][i].T
        h = norm(x, weights["fn"][i])
        x = x + (F.silu(h @ weights["w1"][i].T) * (h @ weights["w3"][i].T)) @ weights["w2"][i].T
    return norm(x, weights["norm"][0]) @ weights["output"][0].T


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_logits_equal_a_forward_pass_in_llama2c_convention(
    tmp_path: Path, version: int, heads: int, kv_heads: int, shared: bool
):
    weights = random_weights(heads, kv_heads, shared)
    write(tmp_path / "model.bin", weights, heads, kv_heads, shared, version)
    model = load_folder(tmp_path / "model.bin")
    ids = torch.randint(VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(1))
    assert model.config.tie_embeddings is shared and model.config.seq_len == CONTEXT
    with torch.no_grad():
        found = model(ids[None])[0]
    expected = reference_logits(ids, weights, heads, kv_heads)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # fp32 sums in another order


def test_one_byte_more_or_less_names_both_sizes(tmp_path: Path):
    path = tmp_path / "model.bin"
    write(path, random_weights(4, 2, False), 4, 2, False, 1)
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0", data[: len(data) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=rf"model.bin must be .*; found {len(wrong)}"):
            load_folder(path)


def test_quantized_and_absurd_headers_are_refused(tmp_path: Path):
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("Ii7i", 0x616B3432, 2, 8, 8, 1, 2, 2, 8, 8).ljust(400, b"\0"))
    with pytest.raises(CheckpointError, match=r"must be llama2\.c version 0 or 1 .*found version 2"):
        load_folder(path)
    for sizes in ([2**31 - 1] * 7, [-1] * 7, [0] * 7, [8, 8, 2**30, 2, 2, 8, 8], [9, 8, 1, 2, 2, 8, 8]):
        path.write_bytes(struct.pack("7i", *sizes).ljust(400, b"\0"))
        with pytest.raises(CheckpointError, match=r"must begin with a llama2\.c header"):
            load_folder(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="found 0 bytes"):
        load_folder(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"found a torch archive.*Name a Hugging Face model by its folder"):
        load_folder(path)
