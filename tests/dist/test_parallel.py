"""Strategies, sums without an order, models made slice by slice, activation checkpointing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylab.config.architecture import Model
from tinylab.config.schema import Parallel
from tinylab.dist.canonical import FixedPointSum
from tinylab.dist.context import Context
from tinylab.dist.parallel import strategy_of
from tinylab.dist.recompute import recompute_blocks
from tinylab.model.loss import loss_sum
from tinylab.model.precision import resolve_precision
from tinylab.model.transformer import Llama

Job = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """Runs a function of rank_jobs.py on so many ranks; what each of them answers."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_jobs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def run(do: str, ranks: int, **options: Any) -> list[Any]:
        stdin.write(json.dumps({"do": do, "ranks": ranks, **options}) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield run
    stdin.close()
    process.wait(timeout=60)
    stdout.close()


@pytest.mark.parametrize(
    ("device", "wanted", "world", "local", "found"),
    [
        ("cuda", "fsdp", 1, 1, "none"),
        ("cpu", "auto", 4, 2, "ddp"),
        ("cuda", "auto", 8, 8, "fsdp"),
        ("cuda", "auto", 16, 8, "hsdp"),
        ("cuda", "auto", 4, 1, "fsdp"),
        ("cpu", "hsdp", 4, 2, "hsdp"),
        ("cpu", "hsdp", 4, 4, "fsdp"),
        ("cpu", "hsdp", 4, 1, "ddp"),
        ("cuda", "ddp", 16, 8, "ddp"),
    ],
)
def test_the_strategy_follows_from_configuration_device_and_machines(
    device: str, wanted: Any, world: int, local: int, found: str
):
    context = Context(device=torch.device(device), world=world, local_world=local)
    assert strategy_of(Parallel(strategy=wanted), context) == found


def test_hsdp_refuses_machines_with_unequal_numbers_of_ranks(job: Job):
    answers = job("first_weights", 3, strategy="hsdp", machines=[2, 2, 1])
    assert all("needs as many ranks on each machine as on the others; found 1, 2 ranks" in a for a in answers)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp"), (3, "fsdp"), (3, "ddp")])
def test_first_weights_are_equal_for_any_number_of_ranks_and_slices_are_parts_of_them(
    tied: bool, ranks: int, strategy: str, job: Job
):
    (alone,) = job("first_weights", 1, tied=tied)
    answers = job("first_weights", ranks, strategy=strategy, tied=tied)
    assert {a["digest"] for a in answers} == {alone["digest"]}
    assert alone["head is embed"] is tied and all(a["head is embed"] is tied for a in answers)
    assert sum(a["own"] for a in answers) == alone["own"] * (ranks if strategy == "ddp" else 1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is read from /proc")
def test_no_rank_of_a_sharded_model_ever_holds_the_whole_model(job: Job):
    for answer in job("peak_growth", 2, strategy="fsdp", model="LARGE"):
        assert 0.4 * answer["whole"] < answer["peak"] < 0.75 * answer["whole"]
    (alone,) = job("peak_growth", 1, model="LARGE")
    assert alone["peak"] > 0.95 * alone["whole"], "the measure must see a whole model"


LAYOUTS = [
    {"ranks": 2, "strategy": "ddp"},
    {"ranks": 3, "strategy": "ddp", "micro_batch": 1},
    {"ranks": 2, "strategy": "fsdp", "recompute": "full"},
    {"ranks": 3, "strategy": "fsdp", "micro_batch": 5},
    {"ranks": 6, "strategy": "hsdp", "machines": [3] * 6, "recompute": "selective"},
]


@pytest.mark.parametrize(("tied", "layouts"), [(False, LAYOUTS), (True, LAYOUTS[3:4])], ids=["untied", "tied"])
def test_canonical_steps_have_the_same_bits_in_any_layout(tied: bool, layouts: list[dict[str, Any]], job: Job):
    (alone,) = job("train", 1, reduction="canonical", tied=tied)
    for layout in layouts:
        answers = job("train", reduction="canonical", tied=tied, **layout)
        assert answers == [alone] * layout["ranks"], layout


def test_fast_steps_agree_between_layouts_but_for_the_order_of_sums(job: Job):
    (alone,) = job("train", 1)
    for layout in LAYOUTS:
        for answer in job("train", **layout):
            for ours, theirs in zip(answer["steps"], alone["steps"], strict=True):
                assert list(map(float.fromhex, ours)) == pytest.approx(list(map(float.fromhex, theirs)), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[1:4:2], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("reduction", ["fast", "canonical"])
def test_infinity_on_one_rank_is_seen_by_all_before_any_updates(reduction: str, layout: dict[str, Any], job: Job):
    answers = job("train", reduction=reduction, poison=True, **layout)
    assert all(a["steps"][2] == ["refused"] for a in answers)
    assert len({a["digest"] for a in answers}) == 1


def test_a_fixed_point_sum_has_no_order():
    generator = torch.Generator().manual_seed(0)
    shares = [torch.randn(1000, generator=generator) * 10.0 ** -(i % 9) for i in range(64)]
    orders = [torch.randperm(64, generator=generator).tolist() for _ in range(5)]
    totals = []
    for order in orders:
        total = FixedPointSum(64, (1000,), torch.device("cpu"))
        for i in order:
            total.add(shares[i])
        assert not total.unusable
        totals.append(total.total())
    assert all(torch.equal(t, totals[0]) for t in totals)
    exact = torch.stack(shares).double().sum(0)
    # Each of 64 shares is rounded by 2^-51 at most, and the sum once to fp32.
    assert (totals[0] - exact).abs().max() <= 64 * 2**-51 + 2**-24 * exact.abs().max()
    in_floats = [sum((shares[i] for i in order), torch.zeros(1000)) for order in orders]
    assert not torch.equal(in_floats[0], in_floats[1]), "the shares must be such that order matters to floats"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 65.0])
def test_a_share_that_does_not_fit_is_counted(bad: float):
    total = FixedPointSum(64, (3,), torch.device("cpu"))
    total.add(torch.tensor([1.0, 64.0, -64.0]))
    assert not total.unusable
    total.add(torch.tensor([0.0, bad, 0.0]))
    assert total.unusable == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_bit_of_loss_and_gradients_and_keeps_less(precision: str, recompute: Any):
    config = Model(vocab_size=64, n_layer=3, d_model=32, n_head=4, n_kv_head=2, d_ff=96, seq_len=64)
    ids = torch.randint(0, 64, (4, 65), generator=torch.Generator().manual_seed(1))
    batch = type("Batch", (), {"inputs": ids[:, :-1], "targets": ids[:, 1:], "document_ids": None})()
    found = {}
    for kind in ("none", recompute):
        model = Llama(config)
        model.init_weights(3)
        recompute_blocks(model, Parallel(recompute=kind))
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), resolve_precision("cpu", precision).step():
            loss = loss_sum(model, batch)
        loss.backward()
        found[kind] = loss, {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())
    (loss, gradients, kept_all), (again, others, kept_less) = found.values()
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, others[name]), name
    assert kept_less < kept_all
