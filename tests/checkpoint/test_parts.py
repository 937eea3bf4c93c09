"""Several ranks' rows become the files that one process would have written, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinylab.checkpoint.parts import OPTIMIZER, WEIGHTS, join_optimizer, join_weights, write_parts
from tinylab.checkpoint.snapshot import Snapshot
from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface import save_weights
from tinylab.model.names import to_huggingface
from tinylab.model.transformer import Llama

MODEL = Model(vocab_size=21, n_layer=2, d_model=8, n_head=4, n_kv_head=1, d_ff=10, seq_len=8)
"""Rows of its fused matrices (12 and 20) and its vocabulary are no multiples of the ranks below."""


def state() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Llama(MODEL)
    model.init_weights(3)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {f"{n}.exp_avg": torch.randn(w.shape) for n, w in weights.items()}
    return weights, moments | {f"{n}.step": torch.tensor(7.0 + i) for i, n in enumerate(weights)}


def by_rows(tensors: dict[str, Tensor], rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rows as FSDP2 shards them (`torch.chunk`); a tensor without rows belongs to the last rank."""
    own, first = {}, {}
    for name, tensor in tensors.items():
        if not tensor.ndim:
            own |= {name: tensor} if rank == world - 1 else {}
            continue
        chunks = tensor.chunk(world)
        if rank < len(chunks):
            own[name], first[name] = chunks[rank].clone(), sum(len(c) for c in chunks[:rank])
    return own, first


def by_tensor(tensors: dict[str, Tensor], rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    return {n: t for i, (n, t) in enumerate(tensors.items()) if i % world == rank}, {}


def write(folder: Path, split: Callable, world: int) -> dict[str, tuple[int, ...]]:
    weights, moments = state()
    shapes = {n: tuple(t.shape) for n, t in moments.items()}
    for rank in range(world):
        (w, first), (o, more) = split(weights, rank, world), split(moments, rank, world)
        write_parts(
            folder, rank, Snapshot(weights=w, optimizer=o, rng={}, first_rows=first | more, shapes=shapes), MODEL
        )
    return shapes


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts"


@pytest.mark.parametrize("world", [2, 3, 5, 16])
@pytest.mark.parametrize("split", [by_rows, by_tensor])
def test_the_files_are_those_of_one_process_byte_for_byte(split: Callable, world: int, parts: Path, tmp_path: Path):
    torch.manual_seed(0)
    shapes = write(parts, split, world)
    join_weights(parts, MODEL, tmp_path / "joined")
    join_optimizer(parts, shapes, tmp_path / "joined" / "optimizer.safetensors")
    torch.manual_seed(0)
    weights, moments = state()
    save_weights(weights, MODEL, tmp_path / "one")
    save_file(moments, tmp_path / "one" / "optimizer.safetensors")
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert sorted(p.name for p in (tmp_path / "joined").iterdir()) == files
    for name in files:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_the_ranks_wrote_before_it_is_joined(parts: Path):
    """An independent reader, which puts rows together again by their offsets."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    torch.manual_seed(0)
    write(parts, by_rows, 3)
    torch.manual_seed(0)
    weights, moments = state()
    for kind, wanted in ((WEIGHTS, to_huggingface(weights, MODEL)), (OPTIMIZER, moments)):
        found = {name: torch.zeros_like(t) for name, t in wanted.items()}
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(parts / kind)), no_dist=True)
        assert all(torch.equal(found[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_rows_that_no_rank_wrote_are_named(lost: int, parts: Path, tmp_path: Path):
    shapes = write(parts, by_rows, 3)
    for kind in (WEIGHTS, OPTIMIZER):
        (parts / kind / f"shard-{lost:05d}-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"every row of \S+ must be written by one rank; of \d+ rows, \d+ were"):
        join_weights(parts, MODEL, tmp_path / "joined")
    with pytest.raises(CheckpointError, match=r"every row of \S+ must be written by one rank"):
        join_optimizer(parts, shapes, tmp_path / "optimizer.safetensors")


def test_a_part_that_was_cut_short_is_named(parts: Path, tmp_path: Path):
    write(parts, by_rows, 2)
    path = next((parts / WEIGHTS).glob("shard-00002-*"))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"shard-00002\S+ must hold 8 bytes more; it was cut short"):
        join_weights(parts, MODEL, tmp_path / "joined")
    shutil.rmtree(parts)
