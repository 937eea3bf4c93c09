"""The registry: exact steps and tokens, every printed spelling, nearest with a note, own runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tinylab.catalog import milestones as registry
from tinylab.catalog.reference import resolve_reference
from tinylab.errors import CheckpointError, NothingFoundError

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
    series = registry.list_milestones("tinyllama-1.1b")
    assert {m.step: m.tokens for m in series} == TOKENS
    assert all(m.repository and m.architecture == "llama" for m in series)


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
    assert found is not None and found.step == step and found.notes == ()


@pytest.mark.parametrize(("ref", "nearest"), [("tinyllama-1.1b@4T", 1_430_512), ("tinyllama-1.1b@20B", 50_000)])
def test_tokens_outside_a_series_are_refused_with_the_nearest(ref: str, nearest: int):
    place = ref.partition("@")[2]
    with pytest.raises(
        NothingFoundError, match=f"no checkpoint near {place} tokens; the nearest is .*@{nearest}, after"
    ):
        registry.find(ref)


def test_the_names_of_the_published_tables_are_typed_here():
    """EVAL.md's first column, and the cards of v1.1; what published scores are keyed by."""
    last = {m.title: m.printed_tokens for m in registry.PUBLISHED if m.series != "pythia-1b" or m.step == 143_000}
    assert last == {
        "50k": "103B",
        "240k": "503B",
        "480k": "1007B",
        "715k": "1.5T",
        "955k": "2T",
        "1195k": "2.5T",
        "1431k": "3T",
        "v1.1": "2T",
        "v1.1 math_code": "2T",
        "v1.1 chinese": "2T",
        "Pythia-1.0B": "300B",
    }


def test_tokens_between_milestones_give_the_nearest_with_a_note():
    found = registry.find("TinyLlama@1.3T")
    assert found is not None and found.step == 715_000
    assert found.notes == (
        "tinyllama-1.1b@1.3T: the nearest checkpoint is tinyllama-1.1b@715000, after 1,499,463,680,000 tokens",
    )


def test_a_step_that_does_not_exist_names_those_that_do():
    with pytest.raises(NothingFoundError, match=r"no checkpoint at step 1431000; it has steps 50000, 240000, .*512"):
        registry.find("tinyllama-1.1b@1431000")
    with pytest.raises(NothingFoundError, match=r"must name a step, tokens such as 1.5T, or a stage \(pretrain\)"):
        registry.find("tinyllama-1.1b@cooldown")


def test_names_that_are_no_published_milestone_are_not_found():
    assert registry.find("demo@500") is None
    assert registry.find("someone/else") is None


def test_repositories_and_variants_are_found():
    found = registry.find("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    assert found is not None and found.tokens == TOKENS[1_430_512]
    for variant in ("", "-math_code", "-chinese"):
        found = registry.find(f"tinyllama-1.1b-v1.1{variant}@cooldown")
        assert found is not None and found.repository == f"TinyLlama/TinyLlama_v1.1{variant.replace('-', '_')}"
        assert registry.find(found.label) == found


def test_pythia_has_154_steps_and_tinyllamas_tokens_per_step():
    series = registry.list_milestones("pythia-1.0b")
    assert len(series) == 154
    assert [m.step for m in series][:13] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert (series[-1].step, series[-1].tokens, series[-1].revision) == (143_000, 299_892_736_000, "step143000")
    assert {m.architecture for m in series} == {"gpt_neox"}


def test_another_architecture_is_refused_before_its_download():
    with pytest.raises(CheckpointError, match="pythia-1b@1000 must be a Llama to open here; it is a gpt_neox"):
        resolve_reference("pythia-1b@1000")


def test_every_name_finds_its_milestone():
    for milestone in registry.PUBLISHED:
        assert registry.find(milestone.label) == milestone


def test_a_series_that_does_not_exist_names_the_nearest():
    with pytest.raises(NothingFoundError, match=r"called pythia-1; did you mean pythia-1b"):
        registry.list_milestones("pythia-1")


def test_the_registry_loads_no_torch():
    code = "import sys, tinylab.catalog.milestones; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
