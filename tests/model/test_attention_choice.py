"""Backends are tried, not imported; a named one is used or refused; on CUDA the fastest that runs is taken."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.config.schema import Parallel
from tinylab.errors import ConfigError
from tinylab.model import attention_choice
from tinylab.model.attention import BACKENDS
from tinylab.model.attention_choice import choose_attention, measure, why_not
from tinylab.model.transformer import Llama

SMALL = Model(vocab_size=16, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, seq_len=16)
CPU = torch.device("cpu")


def test_what_runs_on_a_cpu_was_tried_and_the_rest_has_a_reason():
    found = {name: why_not(name, "cpu", torch.float32) for name in BACKENDS}
    assert {name for name, reason in found.items() if reason is None} == {"torch", "flash", "math"}
    assert all("\n" not in reason for reason in found.values() if reason)


@pytest.mark.parametrize("fault", ["output", "gradient of v"])
def test_a_package_that_imports_but_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch, fault: str):
    math = BACKENDS["math"].attend

    def attend(q: Any, k: Any, v: Any, causal: bool) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if fault != "output":
            return math(q, k, v.detach() + 0.5 * (v - v.detach()), documents=None).transpose(1, 2)
        return 0.5 * math(q, k, v, documents=None).transpose(1, 2)

    broken = ModuleType("flash_attn")
    broken.__dict__.update(flash_attn_func=attend, flash_attn_varlen_func=None)
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    assert f"its {fault} differs from the math kernel's" in str(why_not("flash-attn", "cpu", torch.float32))


def test_a_cpu_takes_torchs_own_choice_and_measures_nothing():
    for documents in (False, True):
        assert choose_attention(SMALL, Parallel(), CPU, torch.float32, documents=documents) == ("torch", {})


@pytest.mark.parametrize("name", ["flash", "math"])
def test_a_named_backend_is_used(name: str):
    assert choose_attention(SMALL, Parallel(attention=name), CPU, torch.float32) == (name, {})


def test_a_named_backend_that_cannot_run_is_refused_with_the_reason_and_those_that_can():
    with pytest.raises(
        ConfigError,
        match=r'parallel\.attention = "cudnn" must be able to run on cpu.*found: RuntimeError: .*'
        r"These can: torch, flash, math",
    ):
        choose_attention(SMALL, Parallel(attention="cudnn"), CPU, torch.float32)
    with pytest.raises(ConfigError, match=r"cannot keep documents apart\. These can: torch, math"):
        choose_attention(SMALL, Parallel(attention="flash"), CPU, torch.float32, documents=True)


def test_on_cuda_the_fastest_of_the_fused_backends_that_run_is_taken(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def measured(names: list[str], *_: Any, **__: Any) -> dict[str, float]:
        asked.append(names)
        return dict.fromkeys(names, 2.0) | {"cudnn": 1.0}

    monkeypatch.setattr(attention_choice, "why_not", lambda name, *_, **__: "no" if name == "xformers" else None)
    monkeypatch.setattr(attention_choice, "measure", measured)
    name, seconds = choose_attention(SMALL, Parallel(), torch.device("cuda"), torch.bfloat16)
    assert name == "cudnn" and seconds["flash"] == 2.0
    assert asked == [["flash-attn", "efficient", "cudnn", "flash"]]


def test_a_measurement_times_each_backend_in_turn():
    seconds = measure(["flash", "math"], (1, 4, 2, 16, 8), CPU, torch.float32, documents=False)
    assert set(seconds) == {"flash", "math"} and all(s > 0 for s in seconds.values())


@pytest.mark.parametrize("name", ["flash", "math"])
def test_the_model_computes_with_the_backend_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch):
    model = Llama(SMALL)
    model.init_weights(0)
    ids = torch.arange(12)[None] % 16
    wanted = model(ids)
    model.attention = BACKENDS[name]
    assert (model(ids) - wanted).abs().max() < 1e-5

    called = []
    spy = attention_choice.Backend("spy", lambda q, k, v, documents: called.append(q.shape) or q)
    model.attention = spy
    model(ids)
    assert called == [torch.Size([1, 4, 12, 8])] * 2


@pytest.mark.parametrize("name", ["torch", "math"])
def test_a_models_documents_do_not_see_one_another(name: str):
    model = Llama(SMALL)
    model.init_weights(0)
    model.attention = BACKENDS[name]
    ids = torch.arange(12)[None] % 16
    documents = torch.tensor([[0] * 5 + [1] * 7])
    together = model(ids, document_ids=documents)
    assert (together[:, :5] - model(ids[:, :5])).abs().max() < 1e-5


def test_a_backend_without_documents_is_refused_by_the_model():
    model = Llama(SMALL)
    model.attention = BACKENDS["flash"]
    with pytest.raises(ConfigError, match="flash cannot keep documents apart"):
        model(torch.zeros(1, 4, dtype=torch.int64), document_ids=torch.zeros(1, 4, dtype=torch.int64))
