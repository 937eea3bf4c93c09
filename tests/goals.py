"""The numbered goals of reliability: the tests that count towards each, and the page that `make stress` writes.

A test marked `goal("R1")` counts one trial, `goal("R1", trials=9)` nine, and one whose count comes out in the end
records the property `trials`. Marked `stress` as well, it runs in `make stress` alone. With `--campaign FOLDER` every
result is kept there under the commit it was obtained at, and a repeat of the command leaves out what has passed.
`python tests/goals.py FOLDER` prints the page.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/reliability.md"


@dataclass(frozen=True)
class Goal:
    """What a goal says, and the number of trials at which it counts as shown."""

    claim: str
    trials: int


GOALS = {
    "R1": Goal("kill -9 of the job at a random moment, on 1 and 2 ranks: nothing is lost", 200),
    "R2": Goal("kill -9 at every labelled point of save, publish, prune and resume: nothing is lost", 90),
    "R3": Goal("one rank killed or stopped: seen in time, rank and step are named, nothing is lost", 40),
    "R4": Goal("SIGTERM, SIGUSR1, SIGINT at a random moment: committed, out in 25 s, no step repeated", 90),
    "R5": Goal("resumed on 1, 2, 1 and 2, 1, 2 ranks: the same samples, bit-equal in canonical mode", 40),
    "R6": Goal("order of the samples over ranks, workers, seeds, resume points: none missing, none twice", 1000),
    "R7": Goal("a full disk at every writer: nothing is lost, path and bytes are named", 100),
    "R8": Goal("a damaged checkpoint: seen, set aside, the newest good one is used", 700),
    "R11": Goal("NaN, infinity or a spike on any rank: no rank updates; skip, stop and rewind are exact", 60),
    "R12": Goal("kernel killed, interrupted, restarted, shut down while training: the run does not notice", 100),
    "R18": Goal("a soak with a random fault about each minute: nothing is lost", 30),
    "R19": Goal("checkpoints of every released format version load and continue bit-equal", 1),
}
NOT_SHOWN = """## What this does not show

- No failure in n independent trials bounds the failure rate below 3/n at 95% confidence; no count shows zero.
- Loss of power, hangs inside NCCL, several real machines, renames on NFS or Lustre, and kernels of GPUs that differ
  from one launch to the next were not tried.
- Bits are equal on one type of processor, one number of threads and one build of torch, not across them.
- Goals that are missing or have fewer trials than wanted have not been shown at that commit.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", metavar="FOLDER", help="keep results in FOLDER and leave out what passed")
    parser.addoption("--goal", metavar="R1", help="only the tests of this goal")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    campaign, only = config.getoption("--campaign"), config.getoption("--goal")
    if only is not None and only not in GOALS:
        raise pytest.UsageError(f"--goal must be one of {', '.join(GOALS)}; found {only}")
    passed = {r["test"] for r in _results(campaign) if r["outcome"] == "passed"} if campaign else set()
    left_out = []
    for item in items:
        goal = _goal(item)
        item.user_properties += goal
        if item.nodeid in passed or (only is not None and dict(goal).get("goal") != only):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _goal(item: pytest.Item) -> list[tuple[str, Any]]:
    """Goal and number of trials of a test, as properties of its report; none for other tests."""
    mark = item.get_closest_marker("goal")
    if mark is None:
        return []
    (name,) = mark.args
    assert name in GOALS, f"{item.nodeid}: goal {name} must be one of {', '.join(GOALS)}"
    return [("goal", name), ("trials", mark.kwargs.get("trials", 1))]


class Campaign:
    """Keeps the results of the tests that count towards a goal."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "goal" not in properties or (report.when != "call" and report.passed):
            return
        result = {
            "commit": _commit(),
            "test": report.nodeid,
            "goal": properties["goal"],
            "trials": properties["trials"],
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "time": time.time(),
        }
        path = Path(self._folder, "results.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    campaign = config.getoption("--campaign")
    if campaign and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Campaign(campaign))


def _results(folder: str) -> Iterator[dict[str, Any]]:
    """The latest result of each test at the commit checked out."""
    path = Path(folder, "results.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    yield from {r["test"]: r for r in found if r["commit"] == _commit()}.values()


def _commit() -> str:
    """The commit checked out, with a digest of what differs from it."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD").decode().strip()
        changes = _git("diff", "HEAD", "--", ".", f":!{PAGE}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


def page(results: list[dict[str, Any]]) -> str:
    """The page in Markdown: each goal with its trials, and every test that failed."""
    import torch

    from tinylab.runs.provenance import processor

    lines = [
        "# Reliability, counted",
        "",
        "Written by `make stress`; `make stress only=R1` runs one goal, a repeat leaves out what has passed.",
        "",
        f"Commit {_commit()} · {time.strftime('%Y-%m-%d')} · {processor()}, {len(os.sched_getaffinity(0))} cores · "
        f"torch {torch.__version__.partition('+')[0]} on the CPU, gloo",
        "",
        "| goal | claim | wanted | held | failed | fails in fewer than (95%) | minutes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, goal in GOALS.items():
        of_goal = [r for r in results if r["goal"] == name]
        held = sum(r["trials"] for r in of_goal if r["outcome"] == "passed")
        failed = sum(r["outcome"] == "failed" for r in of_goal)
        bound = f"{3 / held:.1%}" if held >= 10 and not failed else ""
        minutes = sum(r["seconds"] for r in of_goal) / 60
        lines.append(f"| {name} | {goal.claim} | {goal.trials} | {held} | {failed} | {bound} | {minutes:.1f} |")
    failures = [f"- `{r['test']}`" for r in results if r["outcome"] == "failed"]
    lines += ["", *(["## Failed", "", *failures, ""] if failures else []), NOT_SHOWN]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(list(_results(sys.argv[1]))), end="")
