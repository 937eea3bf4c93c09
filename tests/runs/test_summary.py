"""Many runs at a glance: what is selected, how it is sorted, and that a broken run hides no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.config.presets import preset
from tinylab.errors import ConfigError
from tinylab.runs.folder import Run
from tinylab.runs.summary import condition, require_known, run_summary, select, summarize


def make(path: Path, lr: float, loss: float | None) -> Run:
    """A run that has reached step 3 if it has a loss."""
    run, config = Run(path), preset("tiny", 200_000)
    run.create(replace(config, optimizer=replace(config.optimizer, lr=lr)), {})
    if loss is not None:
        run.metrics_path.write_text(json.dumps({"step": 3, "tokens": 12_288, "loss": loss}) + "\n")
        run.write_status("done", 3, world=2)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [make(tmp_path / "a", 1e-3, 3.0), make(tmp_path / "b", 3e-3, 2.5), make(tmp_path / "c", 1e-3, None)]


def names(rows: list[dict]) -> str:
    return "".join(row["run"] for row in rows)


def chosen(runs: list[Run], *conditions: str, sort: str | None = None) -> str:
    parsed = [condition(text) for text in conditions]
    keys = [key for key, _, _ in parsed] + ([sort.removeprefix("-")] if sort else [])
    return names(select(summarize(runs, keys), parsed, sort))


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["loss<3"], "b"),
        (["loss<=3"], "ab"),
        (["loss > 2.5"], "a"),
        (["tokens=12.288K"], "ab"),
        (["state=none"], "c"),
        (["state!=none", "optimizer.lr=1e-3"], "a"),
        (["stages.0.batch_tokens=4096"], "abc"),
        (["stages.pretrain.batch_tokens>=4K", "preset=tiny"], "abc"),
        (["parallel.compile=false"], "abc"),
        (["world=2"], "ab"),
        (["run=d"], ""),
    ],
)
def test_conditions_on_columns_and_configuration_keys_select_runs(runs: list[Run], conditions: list[str], found: str):
    assert chosen(runs, *conditions) == found


@pytest.mark.parametrize(
    ("sort", "order"), [("loss", "bac"), ("-loss", "abc"), ("-optimizer.lr", "bac"), ("-run", "cba")]
)
def test_runs_are_sorted_and_those_without_a_value_come_last(runs: list[Run], sort: str, order: str):
    assert chosen(runs, sort=sort) == order


def test_a_key_that_no_run_has_is_refused_with_the_nearest_one(runs: list[Run]):
    with pytest.raises(
        ConfigError, match="optimizer.lrr must be a column .*; no run here has it; columns: checkpoints"
    ):
        require_known(["optimizer.lrr"], summarize(runs, ["optimizer.lrr"]))
    with pytest.raises(ConfigError, match="did you mean loss?"):
        require_known(["los"], summarize(runs, ["los"]))


@pytest.mark.parametrize("text", ["loss", "loss~3", "=3", ""])
def test_what_is_no_condition_is_refused(text: str):
    with pytest.raises(ConfigError, match="a condition must look like KEY=VALUE"):
        condition(text)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.toml", "seed = []"),
        ("metrics.jsonl", "damaged\n"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", '{"loss": "x", "step": {}}\n'),
        ("status.json", '{"state": "running", "heartbeat": "x"}'),
        ("status.json", "[" * 100_000),
        ("journal.jsonl", "damaged\n"),
    ],
)
def test_a_damaged_run_hides_no_other(runs: list[Run], file: str, content: str):
    (runs[1].path / file).write_text(content)
    rows = summarize(runs)
    assert names(rows) == "abc"
    assert [rows[0]["state"], rows[2]["state"]] == ["done", "none"]
    if rows[1]["state"] == "unreadable":
        assert rows[1]["error"]
    assert names(select(rows, [], "-loss"))[-1] != "a"


def test_the_number_of_ranks_is_that_of_the_last_start_where_the_status_does_not_say(runs: list[Run]):
    for world in (1, 4):
        runs[2].write_journal("resumed", step=3, world_size=world)
    assert run_summary(runs[2])["world"] == 4
