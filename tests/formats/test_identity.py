"""The weight hash: the same for the same weights in every format and in memory, and as it always was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.identity import model_weight_hash, weight_hash
from tinylab.formats.litgpt import save_folder, save_pth
from tinylab.formats.load import load_folder, open_weights
from tinylab.model.names import to_huggingface
from tinylab.model.transformer import Llama

MODEL = Model(vocab_size=40, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=32, seq_len=16)


def model_of(seed: int, config: Model = MODEL) -> Llama:
    model = Llama(config)
    model.init_weights(seed)
    return model.eval()


def write(model: Llama, folder: Path, **options: int) -> Path:
    save_weights(model.state_dict(), model.config, folder, **options)
    write_config(model.config, folder, bos_id=1, eos_id=2)
    return folder


def test_weight_hash_does_not_change_with_sharding_and_does_with_one_value(tmp_path):
    one, many = write(model_of(1), tmp_path / "one"), write(model_of(1), tmp_path / "many", max_shard_bytes=1500)
    assert len(list(many.glob("*.safetensors"))) > 2
    assert weight_hash(open_weights(one)) == weight_hash(open_weights(many))
    changed = model_of(1)
    with torch.no_grad():
        changed.norm.weight[3] += 1e-6
    assert weight_hash(open_weights(write(changed, tmp_path / "changed"))) != weight_hash(open_weights(one))


def test_weight_hash_does_not_change_with_a_format_that_stores_the_tied_head(tmp_path):
    model = model_of(0, replace(MODEL, tie_embeddings=True, init="normal"))
    write(model, tmp_path / "hf")
    save_pth(model, tmp_path / "m.pth")
    assert weight_hash(open_weights(tmp_path / "hf")) == weight_hash(open_weights(tmp_path / "m.pth"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_weights_have_one_hash_in_memory_and_in_every_format(dtype, tied, tmp_path):
    model = model_of(2, replace(MODEL, tie_embeddings=tied)).to(dtype)
    expected = model_weight_hash(model)
    write(model, tmp_path / "hf")
    (tmp_path / "litgpt").mkdir()
    save_folder(model, tmp_path / "litgpt")
    save_pth(model, tmp_path / "tinyllama.pth")
    for path in (tmp_path / "hf", tmp_path / "litgpt", tmp_path / "tinyllama.pth"):
        assert weight_hash(open_weights(path)) == expected, path
        assert model_weight_hash(load_folder(path)) == expected, path


def test_a_models_hash_sees_one_value_of_a_fused_matrix():
    model = model_of(3)
    before = model_weight_hash(model)
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.qkv.weight")[-1, -1] += 1e-6
    assert model_weight_hash(model) != before


def test_weight_hash_is_the_sha256_that_its_docstring_describes(tmp_path):
    digest = hashlib.sha256()
    for name, tensor in sorted(to_huggingface(model_of(3).state_dict(), MODEL).items()):
        digest.update(json.dumps([name, "torch.float32", list(tensor.shape)]).encode() + tensor.numpy().tobytes())
    assert weight_hash(open_weights(write(model_of(3), tmp_path / "m"))) == digest.hexdigest()


def test_stored_scores_keep_their_weight_hash(tmp_path):
    """Computed for this model before the hash moved to its own module; scores on disk carry such values."""
    model = Llama(MODEL)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.copy_(torch.arange(weight.numel()).view(weight.shape) / 256 - i)
    expected = "34724cd81845918d400e493f04c92283fe3a011f6b85c942860c405141b0a10d"
    assert weight_hash(open_weights(write(model, tmp_path / "m"))) == expected
