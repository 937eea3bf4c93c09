"""The digest of a configuration follows its meaning, and outlives fields that come later."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import pytest

from tinylab.config import digest
from tinylab.config.architecture import Model, RopeScaling
from tinylab.config.digest import config_digest
from tinylab.config.io import override
from tinylab.config.presets import tiny
from tinylab.config.schema import Optimizer, RunConfig


@dataclass(frozen=True, kw_only=True)
class LaterOptimizer(Optimizer):
    """The section after a field was added to it."""

    variant: str = "plain"


def with_later_field(config: RunConfig, **fields: str) -> RunConfig:
    old = {f.name: getattr(config.optimizer, f.name) for f in dataclasses.fields(Optimizer)}
    return replace(config, optimizer=LaterOptimizer(**old, **fields))  # type: ignore[arg-type]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema in which the optimizer has one more field."""
    monkeypatch.setitem(digest._FIELDS_1, LaterOptimizer, digest._FIELDS_1[Optimizer])
    monkeypatch.setattr(digest, "run_from_dict", lambda values: values)  # knows the present schema only
    monkeypatch.setattr(digest, "run_to_dict", lambda config: config)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("later")
def test_a_later_field_counts_only_where_it_is_not_at_its_default(version: int):
    assert config_digest(with_later_field(tiny()), version) == config_digest(tiny(), version)
    assert config_digest(with_later_field(tiny(), variant="amsgrad"), version) != config_digest(tiny(), version)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("optimizer.weight_decay=0.2", False),
        ("optimizer.clip_norm=none", False),
        ("stages.0.mixture.code=0.4", False),
        ("data.sources.prose.limit_mb=11", False),
        ("model.rope_scaling.factor=4", False),
        ("seed=3408", False),
        ("parallel.micro_batch=4", True),
        ("data.path=elsewhere", True),
        ("faults.nonfinite=skip", True),
        ("optimizer.weight_decay=0.1", True),
    ],
)
def test_only_layout_and_place_of_the_data_may_change(version: int, change: str, same: bool):
    assert (config_digest(override(tiny(), [change]), version) == config_digest(tiny(), version)) is same


def test_a_whole_number_in_place_of_a_fraction_means_the_same():
    whole = replace(tiny(), optimizer=replace(tiny().optimizer, clip_norm=1))
    assert config_digest(whole) == config_digest(tiny())


def test_no_default_changes_its_meaning_under_a_stored_digest():
    """The digest that commit 0dc0bc0 computed itself. It covers every default: one that changes needs a new version."""
    everything = RunConfig(model=Model(vocab_size=4096, rope_scaling=RopeScaling()))
    assert config_digest(everything, 1) == "b3048ed97ee1bc173e6503b0954f1e5d2c5005867c1538e1ae2bcfc1caf41372"
