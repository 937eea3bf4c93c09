"""The Hugging Face folder: both ways, streamed, and what of a hostile or damaged one is refused by name."""

from __future__ import annotations

import copy
import gc
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylab.config.architecture import Model, RopeScaling
from tinylab.errors import CheckpointError
from tinylab.formats.huggingface import read_header, save_weights, weight_files
from tinylab.formats.huggingface_config import config_values, model_from_config, write_config
from tinylab.formats.load import load_folder
from tinylab.model.names import name_map, to_huggingface
from tinylab.model.rope import rope_frequencies
from tinylab.model.transformer import Llama

BASE = Model(vocab_size=31, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, seq_len=16, init="normal")
SHAPES = {
    "plain": BASE,
    "tied": replace(BASE, tie_embeddings=True),
    "wide heads": replace(BASE, d_head=16),
    "linear": replace(BASE, rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
    "llama3": replace(BASE, rope_scaling=RopeScaling(original_seq_len=8), rope_theta=5e5),
}
INDEX = "model.safetensors.index.json"


def saved(folder: Path, config: Model = BASE, max_shard_bytes: int = 9_000, dtype=torch.float32) -> Llama:
    model = Llama(config).to(dtype)
    model.init_weights(1)
    write_config(config, folder, bos_id=1, eos_id=2)
    save_weights(model.state_dict(), config, folder, max_shard_bytes)
    return model.eval()


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_gives_back_the_same_weights_and_configuration(shape: str, tmp_path: Path):
    model = saved(tmp_path, SHAPES[shape])
    loaded = load_folder(tmp_path)
    assert loaded.config == SHAPES[shape]
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_transformers_finds_exactly_its_own_tensors(tmp_path: Path):
    """transformers' module, not our list, says which names and shapes there must be."""
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ours = to_huggingface(model.state_dict(), BASE)
    assert {k: tuple(v.shape) for k, v in theirs.items()} == {k: tuple(v.shape) for k, v in ours.items()}
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    wanted = {part.name: part.shape for parts in name_map(BASE).values() for part in parts}
    assert wanted == {k: tuple(v.shape) for k, v in theirs.items()}


def test_a_folder_written_by_transformers_opens_to_its_logits(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 20_000.0},
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert (load_folder(tmp_path)(ids) - theirs(ids).logits).abs().max() < 1e-5


def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path):
    saved(tmp_path, dtype=torch.bfloat16)
    assert load_folder(tmp_path).embed.weight.dtype == torch.bfloat16
    assert load_folder(tmp_path, dtype=torch.float32).embed.weight.dtype == torch.float32


def test_rotary_buffers_of_old_checkpoints_do_not_change_the_dtype(tmp_path: Path):
    model = saved(tmp_path, max_shard_bytes=10**9, dtype=torch.float16)
    (tmp_path / INDEX).unlink()
    tensors = {k: v.clone() for k, v in to_huggingface(model.state_dict(), BASE).items()}
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(tensors | buffers, tmp_path / "model.safetensors")
    assert load_folder(tmp_path).embed.weight.dtype == torch.float16


def test_shards_stay_below_their_limit_and_the_index_covers_every_tensor(tmp_path: Path):
    model = saved(tmp_path, max_shard_bytes=9_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    contents = {f.name: load_file(f) for f in files}
    assert all(len(c) == 1 or sum(t.nbytes for t in c.values()) <= 9_000 for c in contents.values())
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {k: name for name, c in contents.items() for k in c}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.state_dict().values())


def test_a_single_file_without_an_index_opens(tmp_path: Path):
    model = saved(tmp_path, max_shard_bytes=10**9)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    assert torch.equal(load_folder(tmp_path).head.weight, model.head.weight)


def test_missing_unexpected_and_misshaped_tensors_are_listed_together(tmp_path: Path):
    model = saved(tmp_path, max_shard_bytes=10**9)
    (tmp_path / INDEX).unlink()
    tensors = {k: v.clone() for k, v in to_huggingface(model.state_dict(), BASE).items()}
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.extra.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(31, 33)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_folder(tmp_path)
    text = str(caught.value)
    assert "found 4 differences" in text
    assert "missing: model.layers.1.mlp.up_proj.weight [48, 32]" in text and "missing: model.norm.weight [32]" in text
    assert "unexpected: model.extra.weight [2]" in text
    assert "misshaped: lm_head.weight must be [31, 32], found [31, 33]" in text
    assert "inv_freq" not in text


def test_a_tied_head_that_differs_is_refused(tmp_path: Path):
    config = SHAPES["tied"]
    model = saved(tmp_path, config, 10**9)
    (tmp_path / INDEX).unlink()
    tensors = {k: v.clone() for k, v in to_huggingface(model.state_dict(), config).items()}
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    load_folder(tmp_path)
    save_file(tensors | {"lm_head.weight": torch.zeros(31, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'llama'; found 'gpt2'"),
        ({"model_type": None}, "model_type must be 'llama'; found none"),
        ({"architectures": ["MistralForCausalLM"]}, r"architectures must be .*found \['MistralForCausalLM'\]"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'; found 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False; found True"),
        ({"mlp_bias": True}, "mlp_bias must be False"),
        ({"sliding_window": 64}, "sliding_window = 64 is unknown and may change the model"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is unknown"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_type must be default, linear or llama3; found 'yarn'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear must give factor; found none"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "must give low_freq_factor, high_freq_factor; found none"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor = 0.5 is unknown and may change the model",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_scaling.full_attention = .*yarn.* is unknown and may change the model",
        ),
        ({"hidden_size": None}, "hidden_size must be given"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number; found '32'"),
        ({"num_key_value_heads": 3}, r"n_kv_head \(3\) must divide"),
        ({"vocab_size": -1}, "must be finite and greater than 0"),
    ],
)
def test_a_configuration_that_is_no_llama_is_refused_by_what_differs(changes: dict, message: str, tmp_path: Path):
    saved(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 3e4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"factor": 2.0}, "head_dim": 16},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ],
)
def test_every_spelling_of_rope_gives_transformers_frequencies(rope: dict):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = config_values(BASE)
    values = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling", "head_dim")} | rope
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(values)))  # it writes into what it is given
    assert theirs.attention_scaling == 1.0
    ours = rope_frequencies(model_from_config(values))
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)


def test_every_difference_is_named_at_once():
    with pytest.raises(CheckpointError, match=r"hidden_size must be given.*mlp_bias must be.*logit_scale = 2"):
        model_from_config({"model_type": "llama", "mlp_bias": True, "logit_scale": 2})


def test_tinyllamas_own_configuration_is_read():
    """config.json of TinyLlama/TinyLlama_v1.1, whole."""
    values = {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    assert model_from_config(values) == replace(Model(), init="normal")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "..safetensors/", 3]
)
def test_an_index_that_leaves_its_folder_is_refused(name, tmp_path: Path):
    saved(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json must"):
        load_folder(tmp_path)


def test_an_index_that_names_missing_files_lists_them(tmp_path: Path):
    saved(tmp_path)
    gone = sorted(tmp_path.glob("*.safetensors"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"files that are missing: {gone[0].name}, {gone[1].name}"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\x00"])
def test_a_damaged_index_is_refused_by_name(text: str, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(keep: int, tmp_path: Path):
    saved(tmp_path)
    path = min(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=path.name):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10_000_001) + b" " * 10_000_001,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[1]        }}',
        b"\x80\x04K\x01.",
    ],
)
def test_an_absurd_header_is_refused_by_name(content: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must"):
        read_header(path)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path: Path):
    write_config(BASE, tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors\.index\.json or model\.safetensors"):
        load_folder(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_config(BASE, blocked)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_weights(Llama(BASE).state_dict(), BASE, blocked)


def test_a_model_is_built_without_looking_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of all objects of torch, once in each load by chance: it took twice as long as opening 1.1B parameters."""
    saved(tmp_path)
    empty, inside = Llama.empty, []
    monkeypatch.setattr(Llama, "empty", lambda *given: inside.append(gc.isenabled()) or empty(*given))
    load_folder(tmp_path)
    assert (inside, gc.isenabled()) == ([False], True)
    monkeypatch.setattr(Llama, "empty", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_folder(tmp_path)
    assert gc.isenabled()
