"""Which number format is taken, on machines that have bf16 products and on those that have none."""

from __future__ import annotations

import pytest
import torch

from tinylab.errors import ConfigError
from tinylab.model.precision import autocast, native_bf16, resolve_precision


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "wanted"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_takes_bf16_where_the_cpu_multiplies_in_it(monkeypatch, avx512_bf16: bool, amx: bool, wanted: str):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert resolve_precision("cpu", "auto") == wanted


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_takes_bf16_on_cuda_from_ampere_on(monkeypatch, capability: tuple[int, int], wanted: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision("cuda", "auto") == wanted
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


def test_autocast_multiplies_in_bf16_and_fp32_leaves_everything_alone():
    a = torch.ones(4, 4)
    with autocast("cpu", "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("cpu", "fp32"):
        assert (a @ a).dtype == torch.float32
