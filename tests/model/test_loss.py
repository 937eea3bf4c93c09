"""The loss and its hand-made gradient against torch's cross-entropy and autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tinylab.model.loss as loss_module
from tinylab.config.architecture import Model
from tinylab.model.loss import IGNORED, linear_cross_entropy, loss_sum, token_losses
from tinylab.model.precision import resolve_precision
from tinylab.model.transformer import Llama

SMALL = Model(vocab_size=50, n_layer=1, d_model=16, n_head=2, n_kv_head=1, d_ff=24, seq_len=32, init="normal")


def given(rows: int = 301, width: int = 24, vocabulary: int = 50, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[::7] = IGNORED
    return hidden, weight, targets


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 rows: 301 rows are four whole ones and a rest."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 64)


def test_sum_and_gradients_equal_autograd_in_fp64():
    hidden, weight, targets = given()
    linear_cross_entropy(hidden, weight, targets).mul(0.37).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    wanted = F.cross_entropy(h @ w.t(), targets, reduction="sum", ignore_index=IGNORED)
    wanted.mul(0.37).backward()
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, exact in ((hidden, h), (weight, w)):
        assert ours.grad is not None and exact.grad is not None
        # fp32 against fp64, on gradients up to about 10.
        assert (ours.grad.double() - exact.grad).abs().max() < 2e-5


def test_autocast_errs_no_more_than_torchs_own_autocast():
    hidden, weight, targets = given(vocabulary=400)
    exact = F.cross_entropy(hidden.detach() @ weight.detach().t(), targets, reduction="sum", ignore_index=IGNORED)
    with resolve_precision("cpu", "bf16").step():
        ours = linear_cross_entropy(hidden, weight, targets)
        theirs = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum", ignore_index=IGNORED)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    for a, b in zip(gradients, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        assert a.dtype == torch.float32
        # bf16 keeps 8 bits; the chunks' gradients are rounded one by one.
        assert (a - b).norm() < 0.01 * b.norm()


def test_no_gradient_is_made_when_none_is_wanted():
    hidden, weight, targets = given()
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    assert value.item() == pytest.approx(linear_cross_entropy(hidden, weight, targets).item(), rel=1e-7)


def test_nothing_but_ignored_targets_gives_zero_and_zero_gradients():
    hidden, weight, targets = given()
    value = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    value.backward()
    assert value.item() == 0
    assert hidden.grad is not None and hidden.grad.abs().max() == 0
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_whole_logits_never_exist():
    """The largest tensor made has one chunk's rows."""
    hidden, weight, targets = given(rows=640, vocabulary=300)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest <= max(64 * 300, 640 * 24)


def test_token_losses_sum_to_the_training_loss_of_the_same_batch():
    model = Llama(SMALL)
    model.init_weights(0)
    ids = torch.randint(0, 50, (3, 32), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORED
    each = token_losses(model, ids, targets)
    assert each.shape == (3, 32) and each.dtype == torch.float32
    assert each[:, -1].abs().max() == 0
    batch = SimpleNamespace(inputs=ids, targets=targets, document_ids=None)
    assert loss_sum(model, batch).item() == pytest.approx(each.sum().item(), rel=1e-6)
    wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
    assert each.sum().item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_repeated_is_bit_equal(precision):
    ids = torch.randint(0, 50, (4, 33), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        model = Llama(SMALL)
        model.init_weights(0)
        with resolve_precision("cpu", precision).step():
            loss = loss_sum(model, SimpleNamespace(inputs=ids[:, :-1], targets=ids[:, 1:], document_ids=None))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
