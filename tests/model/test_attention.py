"""Attention against its formula, and capabilities that are tried rather than imported."""

from __future__ import annotations

import math

import pytest
import torch

from tinylab.model.attention import attend, backends, document_mask
from tinylab.model.precision import autocast


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


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (3, 9), (65, 65)])
@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
def test_attention_is_its_formula(queries: int, keys: int, n_kv_head: int):
    q, k, v = heads(queries, keys, n_kv_head=n_kv_head)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert (attend(q, k, v) - by_formula(q, k, v, allowed)).abs().max() < 2e-6


def test_under_autocast_on_a_cpu_attention_stays_exact():
    """There torch's bf16 kernel would be the slower one, so the sums are in fp32."""
    q, k, v = heads(17, 17)
    with autocast("cpu", "bf16"):
        assert (attend(q, k, v) - attend(*heads(17, 17))).abs().max() < 2e-6
    with autocast("cpu", "bf16"):
        assert attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.float32


def test_the_document_mask_is_the_one_written_by_hand():
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert document_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0].int().tolist() == wanted


def test_masked_attention_is_its_formula():
    q, k, v = heads(9, 9)
    mask = document_mask(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]]))
    assert (attend(q, k, v, mask) - by_formula(q, k, v, mask)).abs().max() < 2e-6


def test_capabilities_are_tried_and_each_failure_has_a_reason():
    found = backends("cpu", torch.float32)
    assert set(found) == {"cudnn", "flash", "efficient", "math", "flex", "flash-attn", "xformers"}
    assert found["math"] is None and found["flash"] is None
    assert found["cudnn"] and found["efficient"]
    assert all(reason is None or (reason and "\n" not in reason) for reason in found.values())


def test_a_package_that_imports_but_does_not_work_is_not_live(monkeypatch: pytest.MonkeyPatch):
    import sys
    from types import ModuleType

    broken = ModuleType("flash_attn")
    broken.flash_attn_func = lambda q, k, v, causal: q * 0.5  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    assert "differs from the math backend" in str(backends("cpu", torch.float32)["flash-attn"])
