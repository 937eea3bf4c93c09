"""Conversions: bit-equal round trips, logits equal to transformers', nothing half-written, all problems named."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tinylab.config.architecture import Model
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats import convert as convert_module
from tinylab.formats import litgpt
from tinylab.formats.convert import Format, convert
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.load import load_folder, load_weights, open_weights
from tinylab.model.transformer import Llama

IDS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small Llama written by transformers itself, with a tokenizer's files beside it."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_text("{}")
    return tmp_path / "hf"


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def states_equal(a: Llama, b: Llama) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("kind", "name"), [("tinyllama", "m.pth"), ("litgpt", "lit"), ("huggingface", "copy")])
def test_there_and_back_is_bit_equal_and_transformers_agrees(source: Path, tmp_path: Path, kind: Format, name: str):
    there = convert(source, tmp_path / name, kind)
    opened = open_weights(there.target)
    assert (there.max_difference, there.parameters, there.dtype) == (0.0, 19616, "float32")
    assert states_equal(load_weights(opened), load_folder(source))
    if kind == "tinyllama":
        back = convert(there.target, tmp_path / "back")
        assert back.max_difference == 0.0
        there = back
    if kind != "litgpt":
        assert states_equal(load_folder(there.target), load_folder(source))
        theirs = AutoModelForCausalLM.from_pretrained(there.target).eval()
        original = AutoModelForCausalLM.from_pretrained(source).eval()
        with torch.no_grad():
            assert torch.equal(theirs(IDS).logits, original(IDS).logits)
            ours = load_folder(there.target)(IDS)
        torch.testing.assert_close(ours, original(IDS).logits, atol=1e-5, rtol=0)  # fp32, sums in another order
    assert leftovers(tmp_path) == []


def test_tokenizer_and_special_ids_go_along(source: Path, tmp_path: Path):
    convert(source, tmp_path / "copy")
    assert {"tokenizer.json", "tokenizer_config.json", "manifest.json"} <= {
        p.name for p in (tmp_path / "copy").iterdir()
    }
    values = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_compared_with_the_source_as_it_was(source: Path, tmp_path: Path, dtype: torch.dtype):
    """The true difference: transformers' own model in fp32 and ours from the written file, on the same ids."""
    done = convert(source, tmp_path / "half", dtype=dtype)
    written = load_folder(tmp_path / "half")
    assert f"torch.{done.dtype}" == str(dtype) and written.head.weight.dtype == dtype
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
        true = float((written(ids).float() - original).abs().max())
    assert true > 1e-4
    assert done.max_difference == pytest.approx(true, abs=1e-5)  # fp32, sums in another order
    assert f"largest difference of logits {done.max_difference:g}" in str(done)


def test_a_cast_that_overflows_is_refused_with_the_share_of_finite_logits(source: Path, tmp_path: Path):
    model = load_folder(source)
    with torch.no_grad():
        model.head.weight[:16].mul_(1e7)  # a quarter of the vocabulary
    scaled = tmp_path / "scaled"
    save_weights(model.state_dict(), model.config, scaled)
    write_config(model.config, scaled)
    message = r"half must give finite logits; in float16 75\.00% of them are finite, .*source all.*take bf16 or fp32"
    with pytest.raises(CheckpointError, match=message):
        convert(scaled, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists() and leftovers(tmp_path) == []
    assert convert(scaled, tmp_path / "wide", dtype=torch.bfloat16).max_difference < math.inf


def test_a_source_without_finite_logits_is_refused(source: Path, tmp_path: Path):
    model = load_folder(source)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    save_weights(model.state_dict(), model.config, tmp_path / "nan")
    write_config(model.config, tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"nan must give finite logits; 0\.00% of them are finite"):
        convert(tmp_path / "nan", tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and leftovers(tmp_path) == []


def test_a_wrong_epsilon_is_no_rounding_even_in_bf16(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = convert_module.write_config
    wrong = lambda config, folder, **more: write(replace(config, norm_eps=1e-2), folder, **more)  # noqa: E731
    monkeypatch.setattr(convert_module, "write_config", wrong)
    with pytest.raises(CheckpointError, match=r"must give the logits of .*the largest difference is"):
        convert(source, tmp_path / "half", dtype=torch.bfloat16)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_hugging_face_weights_open_without_unpickling(source: Path, tmp_path: Path, sharded: bool):
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old checkpoints have it
    names = sorted(state)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    folder = pickled_folder(source, tmp_path / "old", {f: {n: state[n] for n in part} for f, part in parts.items()})
    assert states_equal(load_weights(open_weights(folder)), load_folder(source))


def pickled_folder(source: Path, folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> Path:
    """`source`'s configuration with `parts` as `.bin` files; an index when there are several."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    for file, part in parts.items():
        torch.save(part, folder / file)
    if len(parts) > 1:
        where = {n: file for file, part in parts.items() for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_tensor_in_two_files_is_refused(source: Path, tmp_path: Path):
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    more = {"model.norm.weight": torch.zeros(32)}
    folder = pickled_folder(source, tmp_path / "old", {"pytorch_model-1.bin": state, "pytorch_model-2.bin": more})
    with pytest.raises(CheckpointError, match=r"every tensor once; found in two files: model\.norm\.weight"):
        open_weights(folder)


def test_foreign_safetensors_beside_a_bin_are_no_model(source: Path, tmp_path: Path):
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    folder = pickled_folder(source, tmp_path / "old", {"pytorch_model.bin": state})
    save_file({"a": torch.zeros(1)}, folder / "adapter.safetensors")
    assert states_equal(load_weights(open_weights(folder)), load_folder(source))


def test_an_existing_target_and_a_wrong_format_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="must not exist; move it aside"):
        convert(source, source)
    with pytest.raises(ConfigError, match=r"format tinyllama is one file that ends in \.pth"):
        convert(source, tmp_path / "folder", "tinyllama")
    with pytest.raises(ConfigError, match="format must be one of huggingface, litgpt, tinyllama; found 'gguf'"):
        convert(source, tmp_path / "folder", "gguf")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["m.pth", "copy"])
def test_of_two_conversions_to_one_target_one_wins_complete(source: Path, tmp_path: Path, name: str, monkeypatch):
    """Another process begins and ends the same conversion when this one has written and not yet compared."""
    write = convert_module._write

    def write_and_wait(*arguments: Any) -> Path:
        written = write(*arguments)
        monkeypatch.setattr(convert_module, "_write", write)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            convert(source, tmp_path / name)
        return written

    monkeypatch.setattr(convert_module, "_write", write_and_wait)
    with pytest.raises(CheckpointError, match="must not exist"):
        convert(source, tmp_path / name)
    assert states_equal(load_weights(open_weights(tmp_path / name)), load_folder(source))
    assert leftovers(tmp_path) == []


def test_leftovers_of_a_killed_conversion_are_removed(source: Path, tmp_path: Path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left, running = (f".tmp-copy.{socket.gethostname()}.{pid}.0123abcd" for pid in (killed.pid, os.getppid()))
    for name in (left, running):
        (tmp_path / name).mkdir()
    convert(source, tmp_path / "copy")
    assert leftovers(tmp_path) == [running]


def test_files_are_as_open_to_others_as_the_umask_says(source: Path, tmp_path: Path):
    convert(source, tmp_path / "copy")
    assert len({p.stat().st_mode for p in (tmp_path / "copy").iterdir()}) == 1


@pytest.mark.parametrize("name", ["m.pth", "lit", "copy"])
def test_a_full_disk_leaves_nothing_and_says_so(
    source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    import resource

    kind: Format = {"m.pth": "tinyllama", "lit": "litgpt", "copy": "huggingface"}[name]  # pyright: ignore
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*(make room|File too large)"):
            convert(source, tmp_path / name, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not (tmp_path / name).exists() and leftovers(tmp_path) == []


def test_a_wrong_order_of_rows_is_caught_by_the_logits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(litgpt, "interleave", lambda q, k, v, model: torch.cat((q, k, v)))
    with pytest.raises(CheckpointError, match=r"must give the logits of .*the largest difference is"):
        convert(source, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists() and leftovers(tmp_path) == []


def test_a_model_that_is_no_llama_is_named(source: Path, tmp_path: Path):
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"model_type": "mistral", "sliding_window": 4096}))
    with pytest.raises(CheckpointError, match=r"model_type must be 'llama'; found 'mistral'; sliding_window = 4096"):
        convert(source, tmp_path / "x")


def test_swapped_shards_of_two_models_are_listed(source: Path, tmp_path: Path):
    other = Llama(Model(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=40, seq_len=64))
    other.init_weights(0)
    litgpt.save_pth(other, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as error:
        load_weights(litgpt.open_checkpoint(tmp_path / "m.pth", replace(other.config, d_ff=48)))
    assert str(error.value).count("misshaped") == 6


def test_large_matrices_are_mapped_and_equal_to_read_ones(tmp_path: Path):
    config = Model(vocab_size=2048, n_layer=1, d_model=256, n_head=4, n_kv_head=2, d_ff=1024, seq_len=16)
    model = Llama(config)
    model.init_weights(0)
    save_weights(model.state_dict(), config, tmp_path / "hf")
    write_config(config, tmp_path / "hf")
    weights = open_weights(tmp_path / "hf")
    before = {p: p.read_bytes() for p in (tmp_path / "hf").glob("*.safetensors")}
    mapped, read = load_weights(weights), load_weights(weights, copy=True)
    assert states_equal(mapped, model) and states_equal(read, model)
    assert torch.equal(mapped(IDS), read(IDS)) and mapped.embed.weight.requires_grad
    with torch.no_grad():
        for weight in mapped.parameters():
            weight.zero_()
    assert {p: p.read_bytes() for p in before} == before
    assert states_equal(load_weights(weights), model)
    tied = Llama(replace(config, tie_embeddings=True))
    tied.init_weights(0)
    save_weights(tied.state_dict(), tied.config, tmp_path / "tied")
    write_config(tied.config, tmp_path / "tied")
    loaded = load_weights(open_weights(tmp_path / "tied"))
    assert loaded.head.weight is loaded.embed.weight and states_equal(loaded, tied)
