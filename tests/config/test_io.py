"""TOML in, TOML out: equal configurations; wrong keys, types and duplicates named together, with the nearest name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylab.config.architecture import Model, RopeScaling
from tinylab.config.counts import parse_count
from tinylab.config.io import MAX_BYTES, load_run, override, run_from_dict, run_to_dict, run_to_toml
from tinylab.config.presets import PRESETS, tiny
from tinylab.config.schema import Data, Optimizer, RunConfig, Source
from tinylab.config.stages import Schedule, Stage
from tinylab.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(tmp_path: Path, name):
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(PRESETS[name]()))
    assert load_run(path) == PRESETS[name]()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
fractions = st.floats(1e-12, 1.0, exclude_max=True)


@st.composite
def configurations(draw) -> RunConfig:
    """Runs with awkward texts, floats and optional sections."""
    sources = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    stages = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    kinds = st.sampled_from(["linear", "llama3"])
    scaling = st.none() | st.builds(RopeScaling, rope_type=kinds, factor=st.floats(1, 99))
    limits = st.none() | fractions
    return RunConfig(
        preset=draw(texts),
        seed=draw(st.integers(0, 2**63 - 1)),
        model=Model(seq_len=16, rope_scaling=draw(scaling), tie_embeddings=draw(st.booleans())),
        data=Data(
            sources=tuple(Source(name=n, corpus="files:" + draw(texts), limit_mb=draw(limits)) for n in sources),
            path=draw(st.none() | texts),
            vocab_size=32_000,
            validation_fraction=draw(st.floats(1e-9, 0.49)),
        ),
        stages=tuple(
            Stage(
                name=name,
                tokens=draw(st.integers(1, 2**62)),
                batch_tokens=16,
                mixture={s: draw(st.floats(0.001, 9)) for s in sources},
            )
            for name in stages
        ),
        schedule=Schedule(kind="constant", warmup_tokens=0, end=draw(fractions)),
        optimizer=Optimizer(lr=draw(fractions), betas=(draw(fractions), draw(fractions))),
    )


@settings(max_examples=100, derandomize=True, deadline=None)
@given(run=configurations())
def test_any_configuration_survives_toml_exactly(run):
    assert run_from_dict(tomllib.loads(run_to_toml(run))) == run


def test_absent_optional_fields_are_left_out_of_the_file():
    assert "path" not in tomllib.loads(run_to_toml(tiny()))["data"]
    assert "rope_scaling" not in run_to_dict(tiny())["model"]


# ---- what a file may get wrong --------------------------------------------------------------------------------------


def load_text(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    return load_run(path)


def test_an_unknown_key_is_named_with_the_nearest_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"bad\.toml: unknown key optimizer\.leraning_rate; known: kind, lr, betas"):
        load_text(tmp_path, "[optimizer]\nleraning_rate = 1e-3\n")
    with pytest.raises(ConfigError, match=r"unknown key model\.n_heads; did you mean model\.n_head\?"):
        load_text(tmp_path, "[model]\nn_heads = 4\n")


def test_every_problem_of_a_file_is_reported_at_once(tmp_path: Path):
    text = 'seed = "x"\nsed = 1\n[model]\nn_layer = 2.5\n[optimizer]\nlr = true\nbetas = [0.9]\n'
    text += '[schedule]\nkind = "cosin"\n'
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    for problem in (
        "seed must be a whole number; found 'x'",
        "unknown key sed; did you mean seed?",
        "model.n_layer must be a whole number; found 2.5",
        "optimizer.lr must be a finite number; found True",
        "optimizer.betas must hold 2 values; found 1",
        "schedule.kind must be one of cosine, linear, constant, wsd; found 'cosin'; did you mean cosine?",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nseed = 2\n", "is not valid TOML: Cannot overwrite a value"),
        ("seed = \n", "is not valid TOML: Invalid value"),
        ("seed = 1e400\n", "seed must be a whole number; found inf"),
        ("seed = nan\n", "seed must be a whole number; found nan"),
        (f"seed = 1{'0' * 400}\n", "seed must be a whole number"),
        (f"seed = 1{'0' * 5000}\n", "is not valid TOML"),
        (f"[optimizer]\nlr = 1{'0' * 400}\n", r"optimizer\.lr must be a finite number"),
        ("stages = 3\n", "stages must be a list; found 3"),
        ("model = 3\n", "model must be a section; found 3"),
        ("[[stages]]\nmixture = 3\n", r"stages\.0\.mixture must be a section; found 3"),
        ("[[data.sources]]\nname = 'a'\n", r"data\.sources\.0: .*corpus"),
        ("x = " + "[" * 60 + "]" * 60, "unknown key x"),
        (".".join("a" * 20_000) + " = 1\n", r"a key must have at most 50 parts; found a\.a\."),
        ("[" + ' . "b"' * 20_000 + "]\n", "a key must have at most 50 parts"),
        ("".join(f"[a{i}]\n" for i in range(500)), "unknown key a19; .*; and 480 more$"),
        ("x = " + "[" * 9999 + "]" * 9999, "is not valid TOML: "),
    ],
)
def test_a_malformed_file_is_one_message(tmp_path: Path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: .*No such file"):
        load_run(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"preset = '\xe9'\n")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*latin\.toml"):
        load_run(tmp_path / "latin.toml")
    (tmp_path / "big.toml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"must be at most {MAX_BYTES} bytes; found {MAX_BYTES + 1}"):
        load_run(tmp_path / "big.toml")


# ---- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_replace_what_they_name_and_nothing_else():
    run = override(
        tiny(),
        [
            "optimizer.lr=1e-3",
            "optimizer.clip_norm=none",
            "stages.0.tokens=1M",
            "stages.pretrain.batch_tokens=1_024",
            "stages.0.mixture.code=0.5",
            "preset=mine",
            "model.rope_scaling.factor=2",
            "data.document_mask=true",
        ],
    )
    base = tiny()
    assert run == replace(
        base,
        preset="mine",
        model=replace(base.model, rope_scaling=RopeScaling(factor=2.0)),
        data=replace(base.data, document_mask=True),
        stages=(replace(base.stages[0], tokens=10**6, batch_tokens=1024, mixture={"prose": 0.7, "code": 0.5}),),
        optimizer=replace(base.optimizer, lr=1e-3, clip_norm=None),
    )
    assert override(base, []) == base


def test_an_override_leaves_the_configuration_it_started_from_alone():
    base = tiny()
    assert override(base, ["stages.0.mixture.prose=none"]).stages[0].mixture == {"code": 0.3}
    assert override(base, ["stages.0.mixture.code=0.9"]).stages[0].mixture == {"prose": 0.7, "code": 0.9}
    assert base == tiny()


def test_an_item_of_a_list_is_the_one_at_its_position_among_equals():
    equal = override(tiny(), ["optimizer.betas=[0.9, 0.9]"])
    assert override(equal, ["optimizer.betas.1=0.5"]).optimizer.betas == (0.9, 0.5)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["optimizer.lr=1", "optimizer.lr=2"], r"optimizer\.lr is set twice; give each key once"),
        (["optimizer.lrr=1"], r"unknown key optimizer\.lrr; did you mean optimizer\.lr\?"),
        (["optimiser.lr=1"], r"unknown key optimiser; did you mean optimizer\?"),
        (["optimizer.lr"], r"an override must look like key=value; found 'optimizer\.lr'"),
        (["=3"], "must look like key=value; found '=3'"),
        (["optimizer.lr=fast"], r"optimizer\.lr must be a finite number; found 'fast'"),
        (["seed.x=1"], r"unknown key seed\.x: seed holds a value, not a section"),
        (["stages.7.tokens=1"], r"unknown key stages\.7\.tokens: '7' must be one of 0, pretrain"),
        (["model.n_head=5"], r"model\.n_head \(5\) must divide model\.d_model \(192\); nearest valid: 6"),
        (["seed=1\noptimizer=2"], "seed must be a whole number; found '1.noptimizer=2'"),
        (["optimizer.lr=none"], r"optimizer\.lr must be a finite number; found None"),
        (["stages=none"], "stages must be a list; found None"),
        (["schedule=none"], "schedule must be a section; found None"),
        (["stages.0.tokens=1.00005K"], r"stages\.0\.tokens must be a whole number such as"),
        (["seed=" + "9" * 5000 + "K"], "seed must be a whole number such as"),
    ],
)
def test_a_wrong_override_is_one_message(assignments, message):
    with pytest.raises(ConfigError, match=message):
        override(tiny(), assignments)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200000", 200_000),
        ("200_000", 200_000),
        ("200K", 200_000),
        ("1.5B", 1_500_000_000),
        ("3T", 3_000_000_000_000),
        (" 7m ", 7_000_000),
        ("2.0", 2),
        ("0", 0),
        (12, 12),
    ],
)
def test_counts_are_read_in_powers_of_a_thousand(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "-1", "1e6", "2.5", "1.0005K", "K", "1KB", "0x10", "\u0663"])
def test_what_is_no_whole_count_is_refused(text):
    with pytest.raises(ConfigError, match=r"tokens must be a whole number such as 200000, 200K, 1\.5B or 3T; found"):
        parse_count(text, "tokens")
