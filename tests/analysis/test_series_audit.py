"""A real small series, trained here by a plain torch loop: clean it gives no problem, each planted fault is found."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tinylab.analysis.series_audit import SeriesAudit, audit_series
from tinylab.analysis.series_order import _added, find_strays, violation
from tinylab.catalog.reference import load_model, resolve_reference
from tinylab.config.architecture import Model
from tinylab.errors import NothingFoundError
from tinylab.evaluation.scores import Scores
from tinylab.formats.huggingface import save_weights
from tinylab.formats.huggingface_config import write_config
from tinylab.formats.identity import model_weight_hash
from tinylab.model.transformer import Llama
from tinylab.runs.folder import Run

SHAPE = Model(vocab_size=48, n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, seq_len=32)
STEPS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128)


def train(folder: Path, seed: int, steps: tuple[int, ...]) -> None:
    """An independent loop: AdamW, cosine, weight decay, on a noisy cyclic language."""
    torch.manual_seed(seed)
    model = Llama(SHAPE)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(steps[-1] + 1):
        if step in steps:
            target = folder / f"s{step:03d}"
            save_weights(model.state_dict(), SHAPE, target)
            write_config(SHAPE, target, bos_id=1, eos_id=2)
            (target / "tokenizer.json").write_text("{}")
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (0.55 + 0.45 * np.cos(np.pi * step / steps[-1]))
        ids = (torch.randint(48, (8, 1)) + torch.arange(33) * torch.randint(1, 4, (8, 1))) % 48
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("series")
    train(root / "mine", 1, STEPS)
    train(root / "other", 2, (64,))
    return root


@pytest.fixture
def series(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "mine", tmp_path / "mine"))


def audit(series: Path) -> SeriesAudit:
    return audit_series(sorted(series.iterdir()))


def kinds(found: SeriesAudit) -> list[tuple[str, tuple[str, ...]]]:
    return [(p.kind, p.labels) for p in found.problems]


def swap(series: Path, a: str, b: str) -> None:
    for name in (p.name for p in (series / a).iterdir()):
        (series / a / name).rename(series / "t")
        (series / b / name).rename(series / a / name)
        (series / "t").rename(series / b / name)


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_clean_series_has_no_problem(series: Path):
    found = audit(series)
    assert found.ok, found.problems
    assert len(found.table) == len(STEPS) and found.distance.shape == (len(STEPS), len(STEPS))
    assert np.allclose(found.distance, found.distance.T) and not found.distance.diagonal().any()
    state = load_file(weights_of(series / "s064"))
    row = found.table[8]
    assert row["norm"] == pytest.approx(sum(float(t.double().pow(2).sum()) for t in state.values()) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(("a", "b"), [("s048", "s064"), ("s000", "s001"), ("s112", "s128"), ("s008", "s016")])
def test_a_swapped_pair_is_found(series: Path, a: str, b: str):
    swap(series, a, b)
    assert kinds(audit(series)) == [("swapped", (a, b))]


@pytest.mark.parametrize(("a", "b"), [("s004", "s096"), ("s032", "s128")])
def test_a_pair_of_distant_checkpoints_that_are_swapped_is_found(series: Path, a: str, b: str):
    swap(series, a, b)
    assert kinds(audit(series)) == [("swapped", (a, b))]


@pytest.mark.parametrize("place", ["s000", "s008", "s064", "s128"])
def test_a_foreign_checkpoint_is_found(trained: Path, series: Path, place: str):
    shutil.rmtree(series / place)
    shutil.copytree(trained / "other" / "s064", series / place)
    assert kinds(audit(series)) == [("foreign", (place,))]


@pytest.mark.parametrize(("wrong", "right"), [("s032", "s096"), ("s128", "s064"), ("s000", "s004")])
def test_a_duplicate_is_found_and_the_one_in_the_right_place_is_named(series: Path, wrong: str, right: str):
    shutil.copyfile(weights_of(series / right), weights_of(series / wrong))
    found = audit(series)
    assert kinds(found) == [("duplicate", tuple(sorted((wrong, right))))]
    assert f"{right} is in the right place, not {wrong}" in found.problems[0].message


def test_no_copy_is_named_as_right_when_either_could_be(series: Path):
    found = audit_series([series / "s032", Path(shutil.copytree(series / "s032", series / "copy"))])
    assert [p.message for p in found.problems] == [
        "s032 and copy have the same weights, bit for bit; each could be in the right place"
    ]


def test_a_late_checkpoint_under_an_early_name_is_found(series: Path):
    shutil.copytree(series / "s128", series / "s999")
    state = {n: t * (1 + 1e-4) for n, t in load_file(weights_of(series / "s128")).items()}
    save_file(state, weights_of(series / "s016"), metadata={"format": "pt"})
    shutil.rmtree(series / "s999")
    found = audit(series)
    assert kinds(found) == [("misplaced", ("s016",))]
    assert "s112" in found.problems[0].message or "s128" in found.problems[0].message


def test_a_checkpoint_mixed_from_two_steps_is_found(series: Path):
    state, later = (load_file(weights_of(series / name)) for name in ("s032", "s064"))
    state["model.layers.1.mlp.up_proj.weight"] = later["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights_of(series / "s032"), metadata={"format": "pt"})
    found = audit(series)
    assert ("shared", ("s032", "s064")) in kinds(found)
    assert "share 1 of 16 matrices bit for bit: model.layers.1.mlp.up_proj.weight" in found.problems[0].message


def test_drift_of_configuration_tokenizer_and_dtype_is_found(series: Path):
    values = json.loads((series / "s016" / "config.json").read_text())
    (series / "s016" / "config.json").write_text(json.dumps(values | {"rope_theta": 20000.0, "rope_parameters": None}))
    (series / "s064" / "tokenizer.json").write_text('{"other": 1}')
    (series / "s096" / "tokenizer.json").unlink()
    state = {n: t.to(torch.bfloat16) for n, t in load_file(weights_of(series / "s008")).items()}
    save_file(state, weights_of(series / "s008"), metadata={"format": "pt"})
    found = audit(series)
    expected = [("dtype", ("s008",)), ("config", ("s016",)), ("tokenizer", ("s064",)), ("tokenizer", ("s096",))]
    assert kinds(found) == expected
    assert "rope_theta 20000.0 (the series: 10000.0)" in found.problems[1].message


def test_a_tied_head_stored_in_only_some_files_makes_no_difference(tmp_path: Path):
    """As in series saved by several versions of transformers. The matrices would not even be the same in number."""
    tied = replace(SHAPE, tie_embeddings=True)
    first, second = Llama(tied), Llama(tied)
    first.init_weights(0)
    second.init_weights(1)
    for step in range(5):
        mixed = {n: (1 - step / 8) * t + step / 8 * second.state_dict()[n] for n, t in first.state_dict().items()}
        folder = tmp_path / f"s{step}"
        save_weights(mixed, tied, folder)
        write_config(tied, folder)
        if step % 2:
            state = load_file(weights_of(folder))
            (folder / "model.safetensors.index.json").unlink()
            weights_of(folder).unlink()
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = audit(tmp_path)
    assert found.ok, found.problems
    assert np.allclose(np.diff([row["change"] for row in found.table[1:]]), 0, atol=0.05)


def test_nan_zero_and_damage_are_found_and_the_rest_is_still_judged(series: Path):
    for place, value in (("s008", float("nan")), ("s064", 0.0)):
        state = load_file(weights_of(series / place))
        matrix = state["model.layers.0.mlp.up_proj.weight"]
        matrix[: 1 if value != 0.0 else None] = value
        save_file(state, weights_of(series / place), metadata={"format": "pt"})
    data = weights_of(series / "s032").read_bytes()
    weights_of(series / "s032").write_bytes(data[:-10])
    swap(series, "s096", "s112")
    found = {p.kind: p for p in audit(series).problems}
    assert "s008 holds 32 NaN and 0 infinite values" in found["nan"].message
    assert found["zero"].labels == ("s064",) and found["damaged"].labels == ("s032",)
    assert found["swapped"].labels == ("s096", "s112")


def test_steps_are_ordered_as_numbers_not_as_text(trained: Path, tmp_path: Path):
    steps = {"s032": 960_000, "s064": 1_040_000, "s096": 1_240_000}
    refs = [replace(resolve_reference(trained / "mine" / n), step=s, label=f"iter-{s}") for n, s in steps.items()]
    found = audit_series(refs[::-1])
    assert found.labels == ("iter-960000", "iter-1040000", "iter-1240000") and found.ok


def test_an_empty_series_says_so():
    with pytest.raises(NothingFoundError, match="must have checkpoints; found none"):
        audit_series([])


def test_the_violation_a_point_adds_is_the_difference_it_makes_to_the_path():
    points = np.random.default_rng(0).normal(size=(9, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    path, point = [4, 1, 7, 0, 8, 2], 5
    without = violation(distance, path)
    wanted = [violation(distance, [*path[:i], point, *path[i:]]) - without for i in range(len(path) + 1)]
    assert min(wanted) > 0
    np.testing.assert_allclose(_added(distance, path, point), wanted, rtol=1e-9)


def test_a_series_as_long_as_pythias_is_judged_in_seconds():
    """154 steps, 40 of them with weights of the end, as in EleutherAI/pythia#205. It took minutes once."""
    draw = np.random.default_rng(0)
    points = 5 * draw.normal(size=1000) + np.cumsum(draw.normal(size=(154, 1000)), axis=0)
    order = np.arange(154)
    order[20:100:2] = 153 - np.arange(40) % 30
    rows = points[order] + 0.1 * draw.normal(size=(154, 1000))
    distance = np.stack([np.linalg.norm(rows - row, axis=1) for row in rows])
    norms = np.linalg.norm(rows, axis=1)
    start = time.monotonic()
    strays, _ = find_strays(distance, rows @ rows.T / np.outer(norms, norms))
    assert time.monotonic() - start < 20
    assert {s.index for s in strays} >= set(range(20, 100, 2))


@pytest.mark.parametrize("seed", range(20))
def test_random_walks_with_drift_and_noise_are_clean_until_two_points_are_swapped(seed: int):
    draw = np.random.default_rng(seed)
    n, size = int(draw.integers(5, 14)), 4000
    gaps = np.cumsum(draw.uniform(0.5, 2.0, n))
    walk = np.cumsum(draw.normal(size=(n, size)) * np.sqrt(np.diff(gaps, prepend=0))[:, None], axis=0)
    points = 5 * draw.normal(size=size) + walk + draw.uniform(0, 1) * gaps[:, None] * draw.normal(size=size)

    def judge(order: list[int]):
        rows = points[order]
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        norms = np.linalg.norm(rows, axis=1)
        return find_strays(distance, rows @ rows.T / np.outer(norms, norms))

    assert judge(list(range(n))) == ([], list(range(n)))
    at = int(draw.integers(0, n - 1))
    order = list(range(n))
    order[at], order[at + 1] = order[at + 1], order[at]
    strays, sorted_again = judge(order)
    assert len(strays) == 1 and strays[0].fits
    assert [order[i] for i in sorted_again] == list(range(n))


def test_a_score_an_audit_and_a_live_model_have_one_weight_hash(lab: Path):
    path = Run("tiny").checkpoints()[-1]
    (score, *_) = (r for r in Scores("tiny").records() if r.header["step"] == 24)
    (row,) = audit_series([path]).table
    assert row["hash"] == score.key.weights == model_weight_hash(load_model(path))
