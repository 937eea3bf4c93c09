"""The registry: exact steps and tokens, every printed spelling, nearest with a note, own runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinylab.catalog import milestones as registry
from tinylab.catalog.reference import resolve_reference
from tinylab.config.presets import tiny
from tinylab.errors import CheckpointError, NothingFoundError
from tinylab.runs.folder import Run

# jzhang38/TinyLlama's README and EVAL.md, by hand
TOKENS = {
    50_000: 104_857_600_000,
    240_000: 503_316_480_000,
    480_000: 1_006_632_960_000,
    715_000: 1_499_463_680_000,
    955_000: 2_002_780_160_000,
    1_195_000: 2_506_096_640_000,
    1_430_512: 3_000_001_101_824,
}


def test_tinyllamas_seven_milestones_have_their_exact_tokens():
    series = registry.list_milestones(series="tinyllama-1.1b")
    assert {m.step: m.tokens for m in series} == TOKENS
    assert all(m.repository and not m.has_optimizer and m.architecture == "llama" for m in series)


@pytest.mark.parametrize(
    ("spelling", "step"),
    [
        *(("105b", 50_000), ("104b", 50_000), ("103B", 50_000), ("50K", 50_000), ("503B", 240_000), ("503b", 240_000)),
        *(("1T", 480_000), ("1007B", 480_000), ("1.5T", 715_000), ("2T", 955_000), ("2.5T", 1_195_000)),
        *(("3T", 1_430_512), ("1431k", 1_430_512), ("1430512", 1_430_512), ("480000", 480_000), ("", 1_430_512)),
    ],
)
def test_every_printed_spelling_finds_its_step(spelling: str, step: int):
    found = registry.find(f"tinyllama-1.1b@{spelling}")
    assert found is not None and found.step == step and found.note is None


def test_tokens_between_milestones_give_the_nearest_with_a_note():
    found = registry.find("TinyLlama@1.3T")
    assert found is not None and found.step == 715_000
    assert found.note == (
        "tinyllama-1.1b@1.3T: the nearest checkpoint is tinyllama-1.1b@715000, after 1,499,463,680,000 tokens"
    )


def test_a_step_that_does_not_exist_names_those_that_do():
    with pytest.raises(NothingFoundError, match=r"no checkpoint at step 1431000; it has 50000, 240000, .*1430512"):
        registry.find("tinyllama-1.1b@1431000")
    with pytest.raises(NothingFoundError, match=r"must name a step, tokens such as 1.5T, or a stage \(pretrain\)"):
        registry.find("tinyllama-1.1b@cooldown")


def test_names_of_others_are_left_to_others():
    assert registry.find("demo@500") is None
    assert registry.find("someone/else") is None


def test_repositories_and_variants_are_found():
    found = registry.find("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    assert found is not None and found.tokens == TOKENS[1_430_512]
    for variant in ("", "-math_code", "-chinese"):
        found = registry.find(f"tinyllama-1.1b-v1.1{variant}@cooldown")
        assert found is not None and found.repository == f"TinyLlama/TinyLlama_v1.1{variant.replace('-', '_')}"
        assert registry.find(found.name) == found


def test_pythia_has_154_steps_and_tinyllamas_tokens_per_step():
    series = registry.list_milestones(series="pythia-1.0b")
    assert len(series) == 154
    assert [m.step for m in series][:13] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert (series[-1].step, series[-1].tokens, series[-1].revision) == (143_000, 299_892_736_000, "step143000")
    assert {m.architecture for m in series} == {"gpt_neox"}


def test_another_architecture_is_refused_before_its_download():
    with pytest.raises(CheckpointError, match="pythia-1b@1000 must be a Llama to open here; it is a gpt_neox"):
        resolve_reference("pythia-1b@1000")


def test_every_name_finds_its_milestone():
    for milestone in registry.PUBLISHED:
        assert registry.find(milestone.name) == milestone


def test_own_runs_stand_beside_the_published_ones(tmp_path: Path):
    run = Run(tmp_path / "runs" / "mine")
    config = tiny()
    run.create(config, {})
    for step in (2, 10, 9):
        folder = run.checkpoints_path / f"step-{step:08d}"
        (folder / "trainer").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (run.checkpoints_path / "step-00000011").mkdir()  # no manifest: a save that never ended
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.toml").write_text("nonsense = 1")
    found = registry.list_milestones(tmp_path / "runs", series="mine")
    assert [m.step for m in found] == [2, 9, 10]
    assert [m.tokens for m in found] == [config.tokens_at(s) for s in (2, 9, 10)]
    assert all(m.has_optimizer and m.stage == config.stages[0].name and m.path for m in found)
    with pytest.raises(NothingFoundError, match="no series of checkpoints is called mime; did you mean mine"):
        registry.list_milestones(tmp_path / "runs", series="mime")


def test_the_registry_loads_no_torch():
    code = "import sys, tinylab.catalog.milestones; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
