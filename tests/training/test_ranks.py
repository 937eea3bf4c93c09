"""Several ranks do the run of one: same samples, same losses, one writer. gloo on the CPU."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tinylab.config.io import override
from tinylab.formats.huggingface import save_weights
from tinylab.formats.load import load_folder
from tinylab.model.names import to_huggingface
from tinylab.runs.folder import Run


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_two_ranks_consume_the_samples_of_one_and_lose_alike(
    strategy: str, micro_batch: int, trainer: Any, reference: Run, tmp_path: Path
):
    run = Run(tmp_path / "run")
    layout = [f"parallel.strategy={strategy}", f"parallel.micro_batch={micro_batch}"]
    ended = trainer.go(run.path, override(trainer.config, layout), ranks=2)
    assert ended.code == 0, ended.stderr
    pairs = list(zip(run.metric_records(), reference.metric_records(), strict=True))
    for ours, theirs in pairs:
        assert ours["data_hash"] == theirs["data_hash"]
        for key in ("loss", "validation_loss", "bits_per_byte"):
            # The same sums in another order, in fp32 (reliability goal: 1e-5).
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5)
    assert ended.stderr.count("step 24/24") == 1, "one rank reports"
    require_files_of_one_process(run.checkpoints()[-1], tmp_path)


def require_files_of_one_process(checkpoint: Path, tmp_path: Path) -> None:
    """The folder is what one process would have saved, byte for byte, and transformers reads it."""
    model = load_folder(checkpoint)
    for name in save_weights(model.state_dict(), model.config, tmp_path / "again"):
        assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    optimizer = checkpoint / "trainer" / "optimizer.safetensors"
    moments = load_file(optimizer)
    for name, weight in model.named_parameters():
        assert moments[f"{name}.exp_avg"].shape == weight.shape and moments[f"{name}.step"] == 24
    save_file(moments, tmp_path / "optimizer.safetensors")
    assert (tmp_path / "optimizer.safetensors").read_bytes() == optimizer.read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    for name, ours in to_huggingface(dict(model.named_parameters()), model.config).items():
        assert torch.equal(theirs[name], ours) and theirs[name].dtype == torch.float32


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_killed_and_started_again_end_bit_equal(
    strategy: str, trainer: Any, assert_nothing_lost: Any, tmp_path: Path
):
    config = override(trainer.config, [f"parallel.strategy={strategy}"])
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    assert trainer.go(whole.path, config, ranks=2).code == 0
    killed = trainer.go(cut.path, config, ranks=2, failpoint="step.logged:14")
    assert killed.code != 0 and "Traceback" not in killed.stderr
    assert "LaunchError: all 2 ranks must live to the end; rank 1 found another one gone or silent after step 14" in (
        killed.stderr
    )
    ended = trainer.go(cut.path, config, ranks=2)
    assert ended.code == 0, ended.stderr
    assert_nothing_lost(whole, cut)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_number_of_ranks_may_change_between_starts(strategy: str, trainer: Any, reference: Run, tmp_path: Path):
    run = Run(tmp_path / "run")
    config = override(trainer.config, [f"parallel.strategy={strategy}"])
    assert trainer.go(run.path, config, failpoint="step.logged:6").code != 0
    assert trainer.go(run.path, config, ranks=2, failpoint="step.logged:8").code != 0
    ended = trainer.go(run.path, config)
    assert ended.code == 0, ended.stderr
    worlds = [line["world_size"] for line in run.journal() if line["event"] in ("started", "resumed")]
    assert worlds == [1, 2, 1]
    for ours, theirs in zip(run.metric_records(), reference.metric_records(), strict=True):
        assert ours["data_hash"] == theirs["data_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def largest_difference(one: Run, two: Run) -> float:
    """Of the losses of two runs, relative, over all steps."""
    pairs = zip(one.metric_records(), two.metric_records(), strict=True)
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)


def test_in_bf16_one_and_two_ranks_differ_by_no_more_than_its_rounding_explains(trainer: Any, tmp_path: Path):
    """The bound is 2^16 times the difference of the same two layouts in fp32, or 2^-7 where that is smaller.

    Two layouts compute the same sums from other parts: each part is rounded to a relative error of at most u/2, with
    u = 2^-23 in fp32 and u = 2^-7 in bf16 (8 significant bits against 24). So their gradients differ by u · e, where e
    (which parts, how large, which way they are rounded) depends on weights and samples and not on the precision. What a
    difference of gradients does to the later weights and losses is, to first order, a linear map that depends on the
    trajectory alone. Hence the losses differ by u · c in both precisions with the same kind of c, and in bf16 by the
    ratio of the two u = 2^16 more than in fp32. fp32 rounds more often (also inside each product, whose sums bf16 keeps
    in fp32), so the ratio is on the safe side. First order ends where the difference is no longer small: u = 2^-7, one
    rounding of every gradient, is where the bound stops. Longer runs of any two layouts part like runs of two seeds.
    """
    found = {}
    for precision in ("fp32", "bf16"):
        runs = []
        for ranks in (1, 2):  # one pass of 8 sequences, or two of 4
            runs.append(Run(tmp_path / f"{precision}-{ranks}"))
            changes = [f"parallel.precision={precision}", "parallel.micro_batch=8"]
            ended = trainer.go(runs[-1].path, override(trainer.config, changes), ranks=ranks)
            assert ended.code == 0, ended.stderr
        found[precision] = largest_difference(*runs)
    in_fp32, in_bf16 = found["fp32"], found["bf16"]
    bound = min(2**16 * max(in_fp32, 2**-24), 2**-7)  # losses are stored to no better than one rounding of fp32
    print(f"1 and 2 ranks: losses within {in_fp32:.1e} in fp32, {in_bf16:.1e} in bf16; bound {bound:.1e}")
    assert in_fp32 <= 1e-5
    assert 0 < in_bf16 <= bound


CANONICAL = ["parallel.reduction=canonical"]
LAYOUTS = {"2 ddp": (2, "ddp", {}), "2 fsdp": (2, "fsdp", {}), "4 hsdp": (4, "hsdp", {"LOCAL_WORLD_SIZE": "2"})}


@pytest.fixture(scope="session")
def canonical_reference(trainer: Any) -> Run:
    """The tiny run on one rank, its sums canonical."""
    run = Run(trainer.folder / "canonical")
    ended = trainer.go(run.path, override(trainer.config, CANONICAL))
    assert ended.code == 0, ended.stderr
    return run


def learnt(run: Run) -> tuple[list[list[str]], dict[str, str]]:
    """Every loss, norm and validation as hex floats, and the hashes of the last weights and moments."""
    keys = ("loss", "grad_norm", "validation_loss", "bits_per_byte")
    rows = [[float(r.get(k, 0.0)).hex() for k in keys] for r in run.metric_records()]
    last = run.checkpoints()[-1]
    files = [p for p in sorted(last.rglob("*.safetensors")) if p.name != "rng.safetensors"]
    return rows, {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_canonical_runs_have_the_same_bits_on_any_number_of_ranks(
    layout: str, trainer: Any, canonical_reference: Run, tmp_path: Path
):
    ranks, strategy, env = LAYOUTS[layout]
    run = Run(tmp_path / "run")
    config = override(trainer.config, [*CANONICAL, f"parallel.strategy={strategy}"])
    ended = trainer.go(run.path, config, ranks=ranks, env=env)
    assert ended.code == 0, ended.stderr
    assert learnt(run) == learnt(canonical_reference)


@pytest.mark.goal("R5")
@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1, 2)], ids=["1 2 1", "2 1 2"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.stress) for n in range(1, 20))])
def test_killed_and_resumed_on_other_ranks_a_canonical_run_ends_bit_equal(
    seed: int, worlds: tuple[int, ...], trainer: Any, canonical_reference: Run, tmp_path: Path
):
    """Killed twice at random steps; the strategy of two ranks changes too."""
    run, generator = Run(tmp_path / "run"), random.Random(f"{seed} {worlds}")
    for last, ranks in enumerate(worlds, start=1 - len(worlds)):
        config = override(trainer.config, [*CANONICAL, f"parallel.strategy={generator.choice(['ddp', 'fsdp'])}"])
        failpoint = f"step.logged:{generator.randint(2, 8)}" if last else ""
        ended = trainer.go(run.path, config, ranks=ranks, failpoint=failpoint)
        assert (ended.code == 0) is (last == 0), f"seed {seed}: {ended}"
    assert [x["world_size"] for x in run.journal() if x["event"] in ("started", "resumed")] == list(worlds)
    for ours, theirs in zip(run.metric_records(), canonical_reference.metric_records(), strict=True):
        assert ours["data_hash"] == theirs["data_hash"]
    assert learnt(run) == learnt(canonical_reference)


def test_a_batch_that_ranks_do_not_divide_is_refused(trainer: Any, tmp_path: Path):
    ended = trainer.go(tmp_path / "run", ranks=3)
    assert ended.code == 2 and "number of ranks (3) must divide the sequences of a step (8)" in ended.stderr


def test_what_rank_0_refuses_is_no_defect_on_the_others(trainer: Any, reference: Run):
    ended = trainer.go(reference.path, override(trainer.config, ["seed=12"]), ranks=2)
    assert "ConfigError" in ended.stderr and "seed = 12 asked" in ended.stderr
    assert "rank 1 found another one gone or silent before the first step" in ended.stderr
    assert ended.code in (1, 2) and "Traceback" not in ended.stderr
    finished = trainer.go(reference.path, ranks=2)
    assert finished.code == 0 and finished.stderr.count("is finished") == 1


def test_ranks_that_cannot_write_a_checkpoint_stop_together_and_lose_nothing(
    trainer: Any, assert_nothing_lost: Any, tmp_path: Path
):
    config = override(trainer.config, ["parallel.strategy=fsdp"])
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    assert trainer.go(whole.path, config, ranks=2).code == 0
    assert trainer.go(cut.path, config, ranks=2, failpoint="step.logged:6").code != 0
    kept = {p: p.read_bytes() for folder in cut.checkpoints() for p in folder.rglob("*") if p.is_file()}
    full = trainer.go(cut.path, config, ranks=2, file_bytes=60_000)
    assert full.code == 1 and "LaunchError" not in full.stderr, full
    assert full.stderr.count("\nCheckpointError: rank 0: cannot write") == 2, "both ranks say why"
    assert full.stderr.count("bytes needed") >= 4, "of both ranks' parts"
    failed = [line for line in cut.journal() if line["event"] == "save_failed"]
    assert [line["repeated"] for line in failed] == [True, True, False]
    assert {p: p.read_bytes() for p in kept} == kept
    assert trainer.go(cut.path, config, ranks=2).code == 0
    assert_nothing_lost(whole, cut)


def test_a_signal_to_every_rank_commits_once(trainer: Any, tmp_path: Path):
    run = Run(tmp_path / "run")
    ended = trainer.go(run.path, ranks=2, signal_at=(7, 15))
    assert ended.code == 143 and "after step 7" in ended.stderr
    assert run.journal()[-1]["event"] == "stopped" and run.checkpoints()[-1].name == "step-00000007"


def test_only_rank_0_prepares_the_data_and_the_others_open_them(trainer: Any, reference: Run, tmp_path: Path):
    """Two ranks that start without data: one `prepare` line of each kind, the same samples."""
    run = Run(tmp_path / "run")
    ended = trainer.go(run.path, ranks=2, home=tmp_path / "home")
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("prepare: read prose") == 1 and "another process prepares" not in ended.stderr
    assert [r["data_hash"] for r in run.metric_records()] == [r["data_hash"] for r in reference.metric_records()]


def test_data_that_rank_0_cannot_prepare_end_every_rank_with_its_reason(trainer: Any, tmp_path: Path):
    config = override(trainer.config, ["data.sources.prose.corpus=files:/nowhere/*.txt"])
    ended = trainer.go(tmp_path / "run", config, ranks=2, home=tmp_path / "home")
    assert ended.code != 0 and "Traceback" not in ended.stderr
    assert ended.stderr.count("/nowhere/*.txt") >= 2 and "DataError: source prose" in ended.stderr
    assert "LaunchError: rank 0 must have the data ready before the other ranks begin; it failed: " in ended.stderr
