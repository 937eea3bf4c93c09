"""Random faults by the hundred: the run ends bit-equal to the one that was left alone."""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import override
from tinylab.config.schema import RunConfig
from tinylab.runs.effective_time import effective_time
from tinylab.runs.folder import Run

LAYOUTS = {"one": ([], 1), "ddp": (["parallel.strategy=ddp"], 2), "fsdp": (["parallel.strategy=fsdp"], 2)}
"""Changes of the configuration and number of ranks."""


class Undisturbed:
    """A run with retention, its layout, its reference and how long that took."""

    def __init__(self, trainer: Any, config: RunConfig, layout: str, name: str = "") -> None:
        changes, self.ranks = LAYOUTS[layout]
        self.trainer, self.config = trainer, override(config, changes)
        self.run = Run(trainer.folder / f"undisturbed-{name or layout}")
        ended = self.go(self.run)
        assert ended.code == 0, ended.stderr
        self.seconds = ended.seconds

    def go(self, run: Run, **request: Any) -> Any:
        """Start or resume `run`."""
        return self.trainer.go(run.path, self.config, ranks=self.ranks, **request)


@pytest.fixture(scope="session")
def undisturbed(trainer: Any, pruned_config: RunConfig) -> Callable[[str], Undisturbed]:
    made: dict[str, Undisturbed] = {}

    def get(layout: str) -> Undisturbed:
        return made.get(layout) or made.setdefault(layout, Undisturbed(trainer, pruned_config, layout))

    return get


def kill_until_it_ends(reference: Undisturbed, run: Run, seed: int) -> int:
    """Kill every rank at random moments, half of them while a checkpoint is written; returns the number of kills."""
    generator = random.Random(seed)
    for kills in range(100):
        # On a machine that became busy, a start alone may take what a run took.
        longest = reference.seconds * (1 + kills / 10)
        how: dict[str, Any] = {"kill": (signal.SIGKILL, generator.uniform(0, longest))}
        if kills % 2:
            how = {"kill_in_save": (generator.randint(1, 3), generator.uniform(0, 0.02))}
        ended = reference.go(run, **how)
        if ended.code == 0:
            return kills
        assert ended.code == -signal.SIGKILL, f"seed {seed}, kill {kills + 1}: {ended}"
    raise AssertionError(f"seed {seed}: the run never ends")


@pytest.mark.goal("R1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [4, pytest.param(67, marks=pytest.mark.stress)])
def test_random_kills_lose_nothing(
    wanted: int,
    layout: str,
    undisturbed: Callable[[str], Undisturbed],
    assert_nothing_lost: Any,
    tmp_path: Path,
    record_property: Any,
):
    reference = undisturbed(layout)
    kills, seed = 0, 100 * list(LAYOUTS).index(layout)
    while kills < wanted:
        run = Run(tmp_path / f"run{seed}")
        kills += kill_until_it_ends(reference, run, seed)
        assert_nothing_lost(reference.run, run)
        seed += 1
    record_property("trials", kills)
    print(f"{kills} kills, 0 losses: fewer than {3 / kills:.1%} of kills lose something, at 95% confidence")


@pytest.mark.goal("R4")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.stress) for n in range(1, 10))])
def test_a_signal_at_a_random_moment_commits_and_repeats_no_step(
    seed: int,
    number: signal.Signals,
    code: int,
    layout: str,
    undisturbed: Callable[[str], Undisturbed],
    assert_same_end: Any,
    tmp_path: Path,
):
    reference, run = undisturbed(layout), Run(tmp_path / "run")
    moment = random.Random(f"{seed} {number} {layout}").uniform(0, reference.seconds)
    ended = reference.go(run, kill=(number, moment))
    assert ended.code in (0, code), f"{number.name} after {moment:.3f} s: {ended}"
    assert ended.seconds < moment + 25
    assert reference.go(run).code == 0
    assert all(not line["repeated_steps"] for line in run.journal() if line["event"] == "resumed")
    assert_same_end(reference.run, run)


@pytest.mark.goal("R7")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.stress) for n in range(1, 34))])
def test_a_disk_that_is_full_for_any_writer_loses_nothing(
    seed: int, layout: str, undisturbed: Callable[[str], Undisturbed], assert_same_end: Any, tmp_path: Path
):
    """No file may grow beyond a random size: journal, metrics, weights or moments fail, whichever comes first."""
    reference, run = undisturbed(layout), Run(tmp_path / "run")
    largest = max(p.stat().st_size for p in reference.run.path.rglob("*") if p.is_file())
    size = int(largest ** random.Random(f"{seed} {layout}").uniform(0.5, 0.99))
    ended = reference.go(run, file_bytes=size)
    assert ended.code == 1, f"at most {size} bytes: {ended}"
    assert str(run.path) in ended.stderr and "bytes free" in ended.stderr and "Traceback" not in ended.stderr
    assert reference.go(run).code == 0
    assert_same_end(reference.run, run)


def soak_faults(generator: random.Random, interval: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Faults without end, each with its request to the trainer; every kind comes once before any comes again."""
    kinds = ["every rank killed", "killed in a save", "one rank killed", "stopped", "disk full", "checkpoint damaged"]
    while True:
        for kind in generator.sample(kinds, len(kinds)):
            moment = interval * generator.uniform(0.5, 1.5)
            request: dict[str, Any] = {"kill": (signal.SIGKILL, moment)}
            if kind == "killed in a save":
                request = {"kill_in_save": (generator.randint(1, 4), generator.uniform(0, 0.02))}
            elif kind == "one rank killed":
                request = {"kill": (signal.SIGKILL, moment, generator.randint(0, 1))}
            elif kind == "stopped":
                request = {"kill": (signal.SIGTERM, moment)}
            elif kind == "disk full":
                request["file_bytes"] = generator.randint(20_000, 60_000)
            yield kind, request


def damage_newest(run: Run, generator: random.Random) -> None:
    """Flip a bit in a file of the newest checkpoint, where an older one is there to fall back to."""
    if len(folders := run.checkpoints()) > 1:
        path = generator.choice([p for p in sorted(folders[-1].rglob("*")) if p.is_file()])
        data = bytearray(path.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)


@pytest.mark.goal("R18")
@pytest.mark.parametrize(
    "minutes",
    [0.25, pytest.param(float(os.environ.get("TINYLAB_SOAK_MINUTES", "30")), marks=pytest.mark.stress)],
)
def test_a_soak_with_a_fault_about_each_minute_loses_nothing(
    minutes: float,
    undisturbed: Callable[[str], Undisturbed],
    assert_same_end: Any,
    tmp_path: Path,
    record_property: Any,
):
    short = undisturbed("ddp")
    step_s = statistics.median(record["step_time_s"] for record in short.run.metric_records())
    half = max(48, round(minutes * 60 / step_s / 2)) * 256  # tokens of one of two stages
    changes = [f"stages.{i}.tokens={half}" for i in (0, 1)] + ["saving.early=false", "saving.keep=3"]
    changes += [f"saving.every_tokens={half // 40}", f"validation.every_tokens={half}"]
    long = Undisturbed(short.trainer, override(short.config, changes), "ddp", f"soak-{minutes}")
    generator, run = random.Random(1), Run(tmp_path / "run")
    happened = []
    for kind, request in itertools.islice(
        soak_faults(generator, long.seconds / max(6, minutes)), 20 * max(6, int(minutes))
    ):
        ended = long.go(run, **request)
        if ended.code == 0:
            break
        happened.append(kind)
        if kind == "checkpoint damaged":
            damage_newest(run, generator)
    else:
        raise AssertionError(f"the run never ends: {happened}")
    assert_same_end(long.run, run)
    record_property("trials", len(happened))
    time = effective_time(run.journal(), run.metric_records())
    print(f"{len(happened)} faults over {long.seconds / 60:.1f} minutes of training, nothing lost: {time}")
