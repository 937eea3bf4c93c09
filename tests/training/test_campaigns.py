"""Random faults by the hundred: the run ends bit-equal to the one that was left alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylab.config.io import override
from tinylab.config.schema import RunConfig
from tinylab.runs.folder import Run

LAYOUTS = {"one": ([], 1), "ddp": (["parallel.strategy=ddp"], 2), "fsdp": (["parallel.strategy=fsdp"], 2)}
"""Changes of the configuration and number of ranks."""


class Undisturbed:
    """A run with retention, its layout, its reference and how long that took."""

    def __init__(self, trainer: Any, config: RunConfig, layout: str) -> None:
        changes, self.ranks = LAYOUTS[layout]
        self.trainer, self.config = trainer, override(config, changes)
        self.run = Run(trainer.folder / f"undisturbed-{layout}")
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
@pytest.mark.parametrize("wanted", [4, *(pytest.param(n, marks=pytest.mark.stress) for n in (67,))])
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
