"""Every attention backend against the formula in fp64: outputs and gradients, on shapes no kernel's block divides."""

from __future__ import annotations

import math

import pytest
import torch

from tinylab.model.attention import BACKENDS, TORCH, _causal_blocks, _flex_function, dense_mask, document_lengths
from tinylab.model.attention_choice import why_not
from tinylab.model.precision import resolve_precision

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Errors seen stay below half of these: 24 and 8 bits of mantissa, values of order 1."""
CPU = [(name, "cpu", dtype) for name in ("torch", "flash", "math") for dtype in ROUNDING]
CUDA = [pytest.param(name, "cuda", torch.bfloat16, marks=pytest.mark.gpu) for name in BACKENDS]
DOCUMENTS = [[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]]


def heads(queries: int, keys: int, n_head: int = 6, n_kv_head: int = 2, size: int = 32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, n_head, queries, size, generator=generator)
    k, v = (torch.randn(2, n_kv_head, keys, size, generator=generator) for _ in range(2))
    return q, k, v


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(D)) v in fp64, key heads repeated for their group of query heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def worst_error(name: str, device: str, dtype: torch.dtype, q, k, v, documents=None) -> float:
    """Largest error of output and gradients against the formula on the same rounded inputs."""
    tried = BACKENDS[name]
    size = {"n_head": q.shape[1], "n_kv_head": k.shape[1], "head_size": q.shape[-1]}
    if device == "cuda" and (reason := why_not(name, device, dtype, documents=documents is not None, **size)):
        pytest.skip(f"{name}: {reason}")
    inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    if documents is None:
        prepared, allowed = None, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    else:
        assert tried.documents is not None
        prepared, allowed = tried.documents(documents.to(device)), dense_mask(documents)
    out = tried.attend(*inputs, documents=prepared)
    found = [out, *torch.autograd.grad(out.float().sin().sum(), inputs)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    wanted = by_formula(*exact, allowed)
    wanted = [wanted, *torch.autograd.grad(wanted.sin().sum(), exact)]
    pairs = zip(found, wanted, strict=True)
    return max(((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (3, 9), (65, 65)])
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize(("name", "device", "dtype"), CPU + CUDA)
def test_each_backend_is_the_formula(name, device, dtype, n_kv_head: int, queries: int, keys: int):
    assert worst_error(name, device, dtype, *heads(queries, keys, n_kv_head=n_kv_head)) < ROUNDING[dtype]


@pytest.mark.parametrize("size", [8, 64, 80, 128])
@pytest.mark.parametrize(("name", "device", "dtype"), CPU + CUDA)
def test_each_backend_takes_every_head_size(name, device, dtype, size: int):
    assert worst_error(name, device, dtype, *heads(33, 33, size=size)) < ROUNDING[dtype]


@pytest.mark.parametrize("n_kv_head", [6, 2])
@pytest.mark.parametrize(
    ("name", "device", "dtype"), [case for case in CPU if BACKENDS[case[0]].documents] + CUDA, ids=str
)
def test_each_backend_that_takes_documents_keeps_them_apart(name, device, dtype, n_kv_head: int):
    if BACKENDS[name].documents is None:
        assert why_not(name, device, dtype, documents=True) == "it cannot keep documents apart"
        return
    documents = torch.tensor(DOCUMENTS)
    assert worst_error(name, device, dtype, *heads(9, 9, n_kv_head=n_kv_head), documents) < ROUNDING[dtype]


# Uncompiled, it says once that it is slow; compiled, this test would take half a minute.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_formula_where_no_gradient_is_asked_for():
    """On a CPU it has no backward pass, so its masks are tested by the output alone."""
    q, k, v = heads(9, 9)
    documents = torch.tensor(DOCUMENTS)
    flex = BACKENDS["flex"]
    assert flex.documents
    with torch.no_grad():
        causal = flex.attend(q, k, v, documents=None)
        apart = flex.attend(q, k, v, documents=flex.documents(documents))
        cached = flex.attend(q[:, :, -3:], k, v, documents=None)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (causal - by_formula(q, k, v, allowed)).abs().max() < 2e-6
    assert (cached - by_formula(q, k, v, allowed)[:, :, -3:]).abs().max() < 2e-6
    assert (apart - by_formula(q, k, v, dense_mask(documents))).abs().max() < 2e-6


def test_flex_attention_builds_a_causal_mask_once_for_all_layers_fit_for_a_backward_pass():
    _causal_blocks.cache_clear()
    with torch.inference_mode():
        blocks = _causal_blocks(3, 9, torch.device("cpu"))
    assert _causal_blocks(3, 9, torch.device("cpu")) is blocks
    assert not blocks.kv_indices.is_inference()


def test_flex_attention_is_wrapped_for_compilation_once(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", wrapped.append)
    _flex_function.cache_clear()
    _flex_function(True)
    _flex_function(True)
    _flex_function.cache_clear()
    assert len(wrapped) == 1


def test_the_efficient_kernel_gets_as_many_key_heads_as_query_heads(monkeypatch):
    """It refuses grouped heads."""
    plain = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def math(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", math)
    q, k, v = heads(9, 9, n_kv_head=2)
    found = BACKENDS["efficient"].attend(q, k, v, documents=None)
    assert seen == [(q.shape[1], q.shape[1], False)]
    assert (found - by_formula(q, k, v, torch.ones(9, 9, dtype=torch.bool).tril())).abs().max() < 2e-6


def test_flash_is_torchs_own_choice_on_a_cpu_bit_for_bit():
    """So a run that named no backend, and one written before there was a choice, compute the same."""
    inputs = heads(65, 65)
    assert torch.equal(TORCH.attend(*inputs, documents=None), BACKENDS["flash"].attend(*inputs, documents=None))


def test_under_autocast_on_a_cpu_attention_stays_exact():
    """There torch's bf16 kernel would be the slower one, so the sums are in fp32."""
    q, k, v = heads(17, 17)
    exact = TORCH.attend(q, k, v, documents=None)
    with resolve_precision("cpu", "bf16").step():
        assert (TORCH.attend(q, k, v, documents=None) - exact).abs().max() < 2e-6
        assert TORCH.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), documents=None).dtype == torch.float32


def test_the_dense_mask_is_the_one_written_by_hand():
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert dense_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0].int().tolist() == wanted


def test_lengths_of_documents_end_with_their_rows():
    # Row 1 begins with document 2, as row 0 ends with it: still two documents.
    documents = torch.tensor([[0, 0, 1, 2], [2, 3, 3, 3]])
    assert document_lengths(documents).tolist() == [2, 1, 1, 1, 3]
