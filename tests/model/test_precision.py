"""Which number format is taken, on machines that have bf16 products and on those that have none."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tinylab.checkpoint.state import build_state
from tinylab.config.presets import tiny
from tinylab.dist.context import Context
from tinylab.dist.parallel import layout_of
from tinylab.errors import ConfigError
from tinylab.model.loss import MicroBatch
from tinylab.model.precision import PRECISIONS, Precision, native_bf16, resolve_precision
from tinylab.training.step import train_step


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "wanted"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_takes_bf16_where_the_cpu_multiplies_in_it(monkeypatch, avx512_bf16: bool, amx: bool, wanted: str):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert resolve_precision("cpu", "auto").name == wanted


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_takes_bf16_on_cuda_from_ampere_on(monkeypatch, capability: tuple[int, int], wanted: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision("cuda", "auto").name == wanted
    assert native_bf16("cuda") is (wanted == "bf16")


def test_bf16_on_an_old_gpu_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.0 or later; found Tesla V100"):
        resolve_precision("cuda", "bf16")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="must be auto, fp32 or bf16; found 'fp8'"):
        resolve_precision("cpu", "fp8")


def test_bf16_multiplies_in_bf16_and_fp32_leaves_everything_alone():
    a = torch.ones(4, 4)
    with resolve_precision("cpu", "bf16").step():
        assert (a @ a).dtype == torch.bfloat16
    with resolve_precision("cpu", "fp32").step():
        assert (a @ a).dtype == torch.float32


class Doubled(Precision):
    """Swaps each MLP's last matrix for a module whose products are twice as large, and counts forward passes."""

    name = "doubled"
    passes = 0

    def prepare(self, model):
        class Twice(torch.nn.Linear):
            def forward(self, input):
                return 2 * super().forward(input)

        for block in model.blocks:
            twice = Twice(block.mlp.down.in_features, block.mlp.down.out_features, bias=False)
            twice.weight = block.mlp.down.weight
            block.mlp.down = twice

    @contextmanager
    def step(self):
        Doubled.passes += 1
        yield


def test_another_precision_swaps_modules_of_the_trained_model_and_enters_each_forward_pass(monkeypatch):
    monkeypatch.setitem(PRECISIONS, Doubled.name, Doubled)
    base = tiny()
    config = replace(base, model=replace(base.model, n_layer=1), parallel=replace(base.parallel, precision="doubled"))
    context = Context(device=torch.device("cpu"))
    precision = resolve_precision("cpu", "doubled")
    state = build_state(config, context, None)
    plain = build_state(replace(config, parallel=base.parallel), context, None)
    with torch.no_grad():
        plain.model.blocks[0].mlp.down.weight *= 2
    ids = torch.arange(18).view(2, 9)
    assert torch.equal(state.model(ids), plain.model(ids))
    assert state.model.state_dict().keys() == plain.model.state_dict().keys()
    batches = [MicroBatch(inputs=row[None, :-1], targets=row[None, 1:], document_ids=None) for row in ids]
    train_step(state, batches, 16, lr=1e-3, clip_norm=None, precision=precision, context=context)
    assert Doubled.passes == 2
    assert layout_of(config.parallel, context)["precision"] == "doubled"
