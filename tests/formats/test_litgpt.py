"""lit-gpt's two dialects: hand-checked layouts, litgpt's own code where it is installed, hostile archives."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tinylab.config.architecture import Model, RopeScaling
from tinylab.errors import CheckpointError
from tinylab.formats import litgpt
from tinylab.formats.litgpt_config import KNOWN, find_config, model_from_litgpt, model_to_litgpt
from tinylab.formats.load import load_folder, load_weights
from tinylab.model.names import to_huggingface
from tinylab.model.transformer import Llama

SHAPE = Model(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, seq_len=32)
IDS = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(3))


def make(config: Model = SHAPE, seed: int = 1) -> Llama:
    model = Llama(config)
    model.init_weights(seed)
    with torch.no_grad():  # norms that are not all one, so that two of them exchanged are seen
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def assert_equal_models(a: Llama, b: Llama) -> None:
    assert a.config == replace(b.config, init=a.config.init, init_std=a.config.init_std)
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(logits(a), logits(b))


def official() -> ModuleType:
    """litgpt itself, or a skip that says how to get it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("litgpt", reason="litgpt is not installed; docs/parity.md has the command")


def test_interleaved_rows_are_grouped_by_key_head():
    # 2 key heads of size 2, 2 query heads each: rows by hand, q0 q1 k0 v0 | q2 q3 k1 v1
    config = Model(vocab_size=8, n_layer=1, d_model=8, n_head=4, n_kv_head=2, d_ff=8, seq_len=8)
    by_hand = [
        "q0a",
        "q0b",
        "q1a",
        "q1b",
        "k0a",
        "k0b",
        "v0a",
        "v0b",
        "q2a",
        "q2b",
        "q3a",
        "q3b",
        "k1a",
        "k1b",
        "v1a",
        "v1b",
    ]
    rows = torch.arange(16.0)[:, None].expand(16, 8)
    q, k, v = litgpt.split_interleaved(rows, config)
    found = [[by_hand[int(i)] for i in part[:, 0]] for part in (q, k, v)]
    assert found == [
        ["q0a", "q0b", "q1a", "q1b", "q2a", "q2b", "q3a", "q3b"],
        ["k0a", "k0b", "k1a", "k1b"],
        ["v0a", "v0b", "v1a", "v1b"],
    ]
    assert torch.equal(litgpt.interleave(q, k, v, config), rows)


@pytest.mark.parametrize("dialect", ["tinyllama", "litgpt"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_round_trip_is_bit_equal(tmp_path: Path, dialect: litgpt.Dialect, tied: bool, kv_heads: int):
    model = make(replace(SHAPE, tie_embeddings=tied, n_kv_head=kv_heads))
    if dialect == "litgpt":
        litgpt.save_folder(model, tmp_path / "any name")
        assert_equal_models(model, load_folder(tmp_path / "any name"))
    else:
        litgpt.save_pth(model, tmp_path / "iter-000001-ckpt.pth")
        assert_equal_models(model, load_folder(tmp_path / "iter-000001-ckpt.pth"))


def test_tinyllama_checkpoint_with_optimizer_opens_by_its_name_or_shapes(tmp_path: Path):
    known = KNOWN["tiny_LLaMA_120M"]
    shapes = {f"transformer.h.{i}.norm_{n}.weight": (768,) for i in range(12) for n in (1, 2)}
    shapes |= {"transformer.wte.weight": (32000, 768), "transformer.h.0.attn.attn.weight": (896, 768)}
    shapes |= {"transformer.h.0.mlp.swiglu.w1.weight": (2048, 768)}
    assert find_config(tmp_path / "x.pth", {}, shapes) == known
    assert find_config(tmp_path / "x.pth", {"hparams": {"model_name": "tiny_LLaMA_120M"}}, {}) == known
    with pytest.raises(CheckpointError, match=r"must come with its configuration.*Put litgpt's model_config.yaml"):
        find_config(tmp_path / "x.pth", {}, {**shapes, "transformer.h.12.norm_1.weight": (768,)})

    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    model(IDS).sum().backward()
    optimizer.step()
    wrapped = {"model": litgpt.to_litgpt(model, "tinyllama"), "optimizer": optimizer.state_dict()}
    wrapped |= {"hparams": {"learning_rate": 4e-4, "name": "tinyllama_1b"}, "iter_num": 11444096, "step_count": 1430512}
    torch.save(wrapped, tmp_path / "iter-11444096-ckpt.pth")
    assert_equal_models(model, load_weights(litgpt.open_checkpoint(tmp_path / "iter-11444096-ckpt.pth", SHAPE)))


def test_bfloat16_stays_and_is_converted_on_request(tmp_path: Path):
    model = make().to(torch.bfloat16)
    litgpt.save_pth(model, tmp_path / "m.pth")
    assert load_folder(tmp_path / "m.pth").head.weight.dtype == torch.bfloat16
    wide = load_folder(tmp_path / "m.pth", dtype=torch.float32)
    assert torch.equal(wide.head.weight, model.head.weight.float())


def test_all_tensors_that_do_not_fit_are_listed_together(tmp_path: Path):
    state = litgpt.to_litgpt(make(), "tinyllama")
    del state["transformer.h.1.norm_2.weight"]
    state["transformer.h.0.attn.attn.bias"] = torch.zeros(64)
    state["transformer.h.0.mlp.swiglu.w1.weight"] = torch.zeros(48, 31)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as error:
        load_weights(litgpt.open_checkpoint(tmp_path / "m.pth", SHAPE))
    for line in (
        "missing: model.layers.1.post_attention_layernorm.weight",
        "unexpected: transformer.h.0.attn.attn.bias",
        "misshaped: model.layers.0.mlp.gate_proj.weight must be [48, 32], found [48, 31]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling(rope_type="linear", factor=4.0), RopeScaling(factor=8.0, original_seq_len=16)],
)
def test_configuration_survives_both_ways(scaling: RopeScaling | None):
    config = replace(SHAPE, rope_scaling=scaling, rope_theta=500_000.0, norm_eps=1e-6, d_head=16)
    assert model_from_litgpt(model_to_litgpt(config), "test") == config


def test_other_architectures_are_named():
    values = model_to_litgpt(SHAPE) | {"norm_class_name": "LayerNorm", "bias": True, "sliding_window_size": 128}
    with pytest.raises(CheckpointError, match=r"bias must be False; found True.*sliding_window_size must be null"):
        model_from_litgpt(values, "model_config.yaml")


def test_keys_whose_default_is_another_model_must_be_given():
    values = model_to_litgpt(SHAPE)
    for key in ("rotary_percentage", "parallel_residual", "mlp_class_name", "norm_class_name"):
        with pytest.raises(CheckpointError, match=f"{key} must be given; litgpt's default is"):
            model_from_litgpt({k: v for k, v in values.items() if k != key}, "model_config.yaml")
    with pytest.raises(CheckpointError, match="n_embd must be a whole number; found None"):
        model_from_litgpt({k: v for k, v in values.items() if k != "n_embd"}, "model_config.yaml")


@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=8.0, original_seq_len=16)])
def test_files_of_litgpt_itself_give_its_logits(tmp_path: Path, scaling: RopeScaling | None):
    lit = official()
    from litgpt.utils import save_config  # pyright: ignore[reportMissingImports]

    config = lit.Config(**model_to_litgpt(replace(SHAPE, rope_scaling=scaling)))
    torch.manual_seed(0)
    theirs = lit.GPT(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    ours = load_folder(tmp_path)
    assert ours.config.rope_scaling == scaling
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)  # fp32, sums in another order


@pytest.mark.parametrize("dialect", ["tinyllama", "litgpt"])
def test_litgpt_itself_reads_both_dialects(tmp_path: Path, dialect: litgpt.Dialect):
    lit = official()
    ours = make()
    litgpt.save_pth(ours, tmp_path / "m.pth", dialect)
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    if dialect == "tinyllama":  # its rows are regrouped by litgpt's own hook; its MLP has current names
        names = {"mlp.swiglu.w1": "mlp.fc_1", "mlp.swiglu.w2": "mlp.fc_2", "mlp.swiglu.w3": "mlp.proj"}
        state = {k.replace(k[16:29], names.get(k[16:29], k[16:29])): v for k, v in state["model"].items()}
    theirs = lit.GPT(lit.Config(**model_to_litgpt(SHAPE))).eval()
    theirs.load_state_dict(state)
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)


def test_litgpts_own_conversion_from_hugging_face_is_read(tmp_path: Path):
    lit = official()
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama  # pyright: ignore[reportMissingImports]
    from litgpt.utils import incremental_save  # pyright: ignore[reportMissingImports]

    ours = make(replace(SHAPE, n_kv_head=1))
    config = lit.Config(**model_to_litgpt(ours.config))
    with incremental_save(tmp_path / "lit_model.pth") as saver:
        state: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, state, to_huggingface(ours.state_dict(), ours.config), saver=saver)
        saver.save(state)
    assert_equal_models(ours, load_weights(litgpt.open_checkpoint(tmp_path, ours.config)))
