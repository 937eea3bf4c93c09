"""The time of a run, split by cause: the parts add up to its wall time, whatever happened to it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tinylab.runs.effective_time import PARTS, TrainerClock, effective_time

Line = dict[str, Any]


def step(number: int, seconds: float, wait: float = 0.0, **more: Any) -> Line:
    return {"step": number, "step_time_s": seconds, "data_wait_s": wait, **more}


def test_a_run_of_one_start_by_hand():
    journal: list[Line] = [
        {"event": "started", "time": 105.0, "step": 0, "restart_s": 5.0},
        {"event": "committed", "time": 130.0, "step": 2, "blocked_s": 3.0},
        {"event": "committed", "time": 145.0, "step": 3, "blocked_s": 4.0},
        {"event": "done", "time": 150.0, "step": 3},
    ]
    metrics = [step(1, 10.0, 1.0), step(2, 10.0, 2.0, validation_s=4.0), step(3, 9.0)]
    found = effective_time(journal, metrics)
    expected = {"steps": 26.0, "data_wait": 3.0, "validation": 4.0, "save": 7.0, "restart": 5.0, "other": 5.0}
    assert found.parts == dict.fromkeys(PARTS, 0.0) | expected
    assert found.wall_s == 50.0 and found.ratio == 26 / 50
    assert sum(found.shares().values()) == pytest.approx(1.0)


def test_a_kill_costs_the_repeated_steps_the_pause_and_the_restart():
    journal: list[Line] = [
        {"event": "started", "time": 100.0, "step": 0, "restart_s": 2.0},
        {"event": "committed", "time": 121.0, "step": 2, "blocked_s": 1.0},
        {"event": "resumed", "time": 200.0, "step": 2, "restart_s": 4.0, "last_seen": 145.0, "repeated_s": 20.0},
        {"event": "done", "time": 240.0, "step": 4},
    ]
    found = effective_time(journal, [step(n, 10.0) for n in range(1, 5)])
    assert found.parts == {
        "steps": 40.0,
        "data_wait": 0.0,
        "validation": 0.0,
        "save": 1.0,
        "repeated": 20.0,
        "restart": 6.0,
        "idle": 196.0 - 145.0,
        "other": (45.0 - 20.0 - 1.0 - 20.0) + (40.0 - 20.0),
    }
    assert found.wall_s == 240.0 - 98.0


def test_a_run_that_has_not_begun_has_no_ratio():
    assert effective_time([], []).ratio is None
    assert effective_time([{"event": "failed", "time": 3.0}], []).wall_s == 0.0
    started = effective_time([{"event": "started", "time": 9.0, "step": 0, "restart_s": 2.0}], [])
    assert started.ratio is None and started.wall_s == 2.0


def test_a_run_in_its_first_steps_has_lasted_as_long_as_they_took():
    found = effective_time([{"event": "started", "time": 9.0, "step": 0}], [step(1, 4.0, 1.0), step(2, 4.0, 1.0)])
    assert (found.wall_s, found.ratio) == (8.0, 0.75)


@pytest.mark.parametrize("seed", range(50))
def test_the_parts_of_a_simulated_run_add_up_to_its_wall_time(seed: int):
    """A clock that runs through starts, steps, saves, kills and pauses: every second of it is counted once."""
    generator = random.Random(seed)
    now = opened = 1e9
    journal: list[Line] = []
    metrics: list[Line] = []
    true = dict.fromkeys(PARTS, 0.0)

    def spend(part: str, longest: float) -> float:
        nonlocal now
        seconds = generator.uniform(0, longest)
        now += seconds
        true[part] += seconds
        return seconds

    saved, last_seen, pending = 0, None, {}
    for _ in range(generator.randint(1, 6)):
        if journal:
            spend("idle", 100)
        restart = spend("restart", 5)
        event = "resumed" if journal else "started"
        lost = [line for line in metrics if line["step"] > saved]
        repeated = sum(line["step_time_s"] for line in lost)
        for line in lost:
            true["steps"] -= line["step_time_s"] - line["data_wait_s"]
            true["data_wait"] -= line["data_wait_s"]
            true["validation"] -= line["validation_s"]
            true["other"] += line["validation_s"]
        true["repeated"] += repeated
        metrics = metrics[:saved]
        pending = {"repeated_s": repeated, "last_seen": last_seen} if event == "resumed" else {}
        journal.append({"event": event, "time": now, "step": saved, "restart_s": restart, **pending})
        for number in range(saved + 1, saved + generator.randint(1, 20)):
            wait, compute = spend("data_wait", 1), spend("steps", 10)
            validation = spend("validation", 3)
            metrics.append(step(number, wait + compute, wait, validation_s=validation))
            last_seen = now
            if generator.random() < 0.3:
                blocked = spend("save", 2)
                saved = number
                journal.append({"event": "committed", "time": now, "step": number, "blocked_s": blocked})
                last_seen = now
            spend("other", 0.1)
            last_seen = now
    found = effective_time([*journal, {"event": "done", "time": now}], metrics)
    assert found.parts == pytest.approx(true, abs=1e-3)
    assert found.wall_s == pytest.approx(now - opened, abs=1e-3)


@pytest.mark.parametrize("seed", range(50))
def test_lines_of_any_kind_give_parts_that_are_not_negative(seed: int):
    generator = random.Random(seed)

    def anything() -> Any:
        return generator.choice([None, "x", -5, 0, 3.5, float("nan"), float("inf"), 10**400, True, [], 1e9])

    keys = ("time", "step", "restart_s", "last_seen", "repeated_s", "blocked_s", "step_time_s", "data_wait_s")
    events = ("started", "resumed", "committed", "done", 3)
    lines = [{"event": generator.choice(events)} | {k: anything() for k in keys} for _ in range(12)]
    found = effective_time(lines, lines)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert found.wall_s == pytest.approx(sum(found.parts.values()))


def test_a_trainer_notes_when_it_opened_the_run_and_when_the_one_before_was_seen():
    clock = TrainerClock()
    clock.open(5.0)
    first = clock.opened_at
    clock.open(7.0)
    assert clock.opened_at == first and clock.last_seen == 5.0, "the first opening counts"
    line = clock.started()
    assert line["last_seen"] == 5.0 and line["restart_s"] >= 0
    assert "last_seen" not in clock.started()
