"""A step at fault changes nothing: refused on every rank, named in the journal; skip, rewind and stop are exact."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinylab.checkpoint.state import TrainState
from tinylab.config.faults import Faults
from tinylab.config.io import override
from tinylab.errors import ConfigError
from tinylab.runs.folder import Run
from tinylab.training.faults import is_spike, remember
from tinylab.training.step import StepResult

RANKS = {"one": ([], 1), "ddp": (["parallel.strategy=ddp"], 2), "fsdp": (["parallel.strategy=fsdp"], 2)}
"""Changes of the configuration, and the number of ranks."""


class Trial:
    """A run of which one rank's loss or gradient is spoiled in some steps."""

    def __init__(self, trainer: Any, folder: Path, layout: str = "one", **spoiled: Any) -> None:
        self.changes, self.ranks = RANKS[layout]
        self.trainer, self.folder = trainer, folder
        self.spoiled = {"what": "loss", "factor": math.nan, "rank": 0} | spoiled

    def go(self, name: str, *settings: str, **request: Any) -> tuple[Run, Any]:
        """Start or resume the run `name` under these settings."""
        config = override(self.trainer.config, [*self.changes, *settings])
        run = Run(self.folder / name)
        return run, self.trainer.go(run.path, config, ranks=self.ranks, spoil=self.spoiled, **request)

    def to_the_end(self, name: str, *settings: str) -> Run:
        run, ended = self.go(name, *settings)
        assert ended.code == 0, ended.stderr
        return run


def faults_of(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.journal() if line["event"] == "fault"]


def tensors(run: Run, step: int) -> list[str]:
    """SHA-256 of the weights and of the optimizer's tensors in the checkpoint of `step`."""
    folder = run.checkpoints_path / f"step-{step:08d}"
    files = sorted(p for p in folder.rglob("*.safetensors") if p.name != "rng.safetensors")
    assert len(files) >= 2
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]


def numbers(run: Run) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["data_hash"]) for r in run.metric_records()]


@pytest.mark.parametrize(
    ("layout", "what", "factor", "rank"),
    [("one", "loss", math.inf, 0), ("ddp", "gradient", math.nan, 1), ("fsdp", "loss", math.nan, 1)],
)
def test_a_skipped_step_changes_no_weight_and_no_moment_and_keeps_its_number_samples_and_rate(
    layout: str, what: str, factor: float, rank: int, trainer: Any, reference: Run, tmp_path: Path
):
    trial = Trial(trainer, tmp_path, layout, steps=[5], what=what, factor=factor, rank=rank)
    run = trial.to_the_end("run", "faults.nonfinite=skip")
    assert tensors(run, 5) == tensors(run, 4) and tensors(run, 10) != tensors(run, 5)
    ours, theirs = numbers(run), numbers(reference)
    assert [(x[0], *x[3:]) for x in ours] == [(x[0], *x[3:]) for x in theirs], "step, rate and samples"
    refused = {r["step"]: r["refused"] for r in run.metric_records() if r["refused"]}
    assert refused == {5: "nonfinite"}
    (line,) = faults_of(run)
    assert (line["kind"], line["action"], line["step"], line["ranks"]) == ("nonfinite", "skip", 5, [rank])
    assert line["data_hash"] == theirs[4][4] and line["look"] == f"tinylab batch {run.path} --step 5"
    assert line["grad_norm"] in ("nan", "inf")


def test_by_default_a_step_at_fault_ends_the_run_with_step_rank_and_what_to_do(trainer: Any, tmp_path: Path):
    trial = Trial(trainer, tmp_path, "ddp", steps=[7], rank=1)
    run, ended = trial.go("run")
    assert ended.code == 1 and "Traceback" not in ended.stderr
    assert (
        "loss nan" in ended.stderr
        and "in step 7 on rank 1. The update was not made; weights are those of step 6" in (ended.stderr)
    )
    assert "--set faults.nonfinite=skip" in ended.stderr
    assert [line["action"] for line in faults_of(run)] == ["stop"] and run.journal()[-1]["event"] == "failed"
    again = trial.to_the_end("run", "faults.nonfinite=skip")
    assert [r["step"] for r in again.metric_records() if r["refused"]] == [7]
    assert numbers(again) == numbers(trial.to_the_end("whole", "faults.nonfinite=skip"))


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_more_refused_steps_in_a_row_than_allowed_end_the_run(policy: str, trainer: Any, tmp_path: Path):
    settings = (f"faults.nonfinite={policy}", "faults.max_in_row=2")
    allowed = Trial(trainer, tmp_path, steps=[8, 9, 13, 14]).to_the_end("allowed", *settings)
    assert [r["step"] for r in allowed.metric_records() if r["refused"]] == [8, 9, 13, 14]
    trial = Trial(trainer, tmp_path, steps=[8, 9, 10])
    for _ in range(2):  # a resume counts on
        run, ended = trial.go("run", *settings)
        assert ended.code == 1 and "at most 2 steps in a row may be refused (faults.max_in_row)" in ended.stderr
        assert "found 3 up to step 10" in ended.stderr and "Weights are those of step 7" in ended.stderr
    assert run.status()["state"] == "failed"


@pytest.mark.parametrize("layout", ["one", "fsdp"])
def test_a_rewind_ends_as_if_the_steps_had_been_left_out_and_survives_kills(layout: str, trainer: Any, tmp_path: Path):
    trial = Trial(trainer, tmp_path, layout, steps=[8, 14], rank=RANKS[layout][1] - 1)
    skipped = trial.to_the_end("skipped", "faults.nonfinite=skip")
    rewound = trial.to_the_end("rewound", "faults.nonfinite=rewind")
    assert numbers(rewound) == numbers(skipped) and tensors(rewound, 24) == tensors(skipped, 24)
    assert [r["refused"] for r in rewound.metric_records() if r["refused"]] == ["left out"] * 2
    resumed = [line for line in rewound.journal() if line["event"] == "resumed"]
    assert [(line["step"], line["repeated_steps"]) for line in resumed] == [(5, 2), (12, 1)]
    for failpoint in ("step.logged:7", "begin.metrics_cut:2", "step.logged:9", ""):
        run, ended = trial.go("killed", "faults.nonfinite=rewind", failpoint=failpoint)
        assert (ended.code == 0) is (failpoint == ""), ended.stderr
    assert numbers(run) == numbers(skipped) and tensors(run, 24) == tensors(skipped, 24)


def test_a_rewind_leaves_out_the_steps_that_follow_too(trainer: Any, tmp_path: Path):
    trial = Trial(trainer, tmp_path, steps=[23])
    run = trial.to_the_end("run", "faults.nonfinite=rewind", "faults.rewind_skips=3")
    assert {r["step"]: r["refused"] for r in run.metric_records() if r["refused"]} == {23: "left out", 24: "left out"}
    assert faults_of(run)[0]["left_out"] == [23, 24]
    assert tensors(run, 24) == tensors(
        Trial(trainer, tmp_path, steps=[23, 24]).to_the_end("skipped", "faults.nonfinite=skip"), 24
    )


SPIKES = ("faults.spike_window=6", "faults.spike_sigmas=30")


@pytest.mark.parametrize("action", ["warn", "skip", "rewind"])
def test_a_spike_is_found_alike_by_a_run_that_is_killed_and_one_that_is_not(action: str, trainer: Any, tmp_path: Path):
    trial = Trial(trainer, tmp_path, "ddp", steps=[9, 16], factor=1000.0, rank=1)
    settings = (f"faults.spikes={action}", *SPIKES)
    whole = trial.to_the_end("whole", *settings)
    assert [(line["kind"], line["step"]) for line in faults_of(whole)] == [("spike", 9), ("spike", 16)]
    refused = {"warn": {}, "skip": {9: "spike", 16: "spike"}, "rewind": {9: "left out", 16: "left out"}}[action]
    assert {r["step"]: r["refused"] for r in whole.metric_records() if r["refused"]} == refused
    for failpoint in ("step.logged:7", "step.logged:6", ""):
        run, ended = trial.go("killed", *settings, failpoint=failpoint)
        assert (ended.code == 0) is (failpoint == ""), ended.stderr
    assert numbers(run) == numbers(whole) and tensors(run, 24) == tensors(whole, 24)


def test_a_spike_is_judged_by_the_steps_before_it_and_only_by_a_full_window():
    policy = Faults(spikes="skip", spike_window=4, spike_sigmas=2.0)
    window = [(1.0, 5.0), (2.0, 5.0), (3.0, 5.0), (2.0, 5.0)]  # mean 2, deviation sqrt(1/2) = 0.70711; limit 3.41421
    assert not is_spike(policy, window, 3.4142, 5.0) and is_spike(policy, window, 3.4143, 5.0)
    assert is_spike(policy, window, 2.0, 5.001), "the norm is judged too"
    assert not is_spike(policy, window[1:], 1e9, 1e9)


def test_nothing_that_was_refused_enters_the_window_and_it_forgets_the_oldest():
    policy, state = Faults(spikes="skip", spike_window=3), SimpleNamespace(faults={})
    for i in range(1, 5):
        remember(state, policy, StepResult(loss=float(i), grad_norm=10.0 * i))  # type: ignore[arg-type]
        remember(state, policy, StepResult(loss=math.nan, grad_norm=math.inf, refused="nonfinite"))  # type: ignore[arg-type]
    assert state.faults == {"in_row": 1, "window": [[2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]}
    before = state.faults["window"]
    remember(state, policy, StepResult(loss=5.0, grad_norm=50.0))  # type: ignore[arg-type]
    assert before == [[2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], "a checkpoint may be writing it"
    assert "in_row" not in state.faults and TrainState.__dataclass_fields__["faults"]


def test_a_rewind_that_would_end_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"faults.rewind_skips \(5\) must be at most faults.max_in_row \(3\)"):
        Faults(rewind_skips=5)


@pytest.mark.goal("R11")
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(s, marks=pytest.mark.stress) for s in range(6, 60))])
def test_any_fault_on_any_rank_is_refused_on_all_and_named(seed: int, trainer: Any, tmp_path: Path):
    generator = random.Random(seed)
    layout = list(RANKS)[seed % 3]
    rank = generator.randrange(RANKS[layout][1])
    in_row = generator.randint(1, 3)
    first = generator.randint(8, 20)
    steps = list(range(first, first + in_row))
    what, factor = generator.choice(["loss", "gradient"]), generator.choice([math.nan, math.inf, -math.inf, 1000.0])
    action = generator.choice(["skip", "rewind"])
    trial = Trial(trainer, tmp_path, layout, steps=steps, what=what, factor=factor, rank=rank)
    settings = (f"faults.nonfinite={action}", f"faults.spikes={action}", *SPIKES)
    print(f"seed {seed}: {layout}, rank {rank}, steps {steps}, {what} × {factor}, {action}")
    run = trial.to_the_end("run", *settings)
    assert [r["step"] for r in run.metric_records() if r["refused"]] == steps
    assert [line["step"] for line in faults_of(run)] == steps
    for line in faults_of(run):
        unknown = layout == "fsdp" and what == "gradient"  # the gradients are added up before anybody sees them
        assert line["ranks"] == (None if line["kind"] == "spike" or unknown else [rank])
    cut, ended = trial.go("cut", *settings, failpoint=f"step.logged:{generator.randint(1, 20)}")
    assert ended.code != 0
    cut = trial.to_the_end("cut", *settings)
    other = trial.to_the_end("other", *(s.replace(action, "skip") for s in settings))
    for found in (cut, other):
        assert numbers(found) == numbers(run) or found is other, "killed and resumed"
        assert tensors(found, 24) == tensors(run, 24)
    stopped, ended = trial.go("stopped", *settings, f"faults.max_in_row={in_row}", failpoint="")
    assert ended.code == 0
    if in_row > 1:
        stopped, ended = trial.go("stopped2", *settings, f"faults.max_in_row={in_row - 1}")
        assert ended.code == 1 and f"at most {in_row - 1} steps in a row" in ended.stderr
        assert stopped.metric_records()[-1]["step"] == steps[-2]
