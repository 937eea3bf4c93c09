"""Tables of a model's parts and costs."""

from __future__ import annotations

import pytest

from tinylab.analysis import anatomy
from tinylab.config import presets


@pytest.mark.parametrize("name", ["tiny", "tinyllama_120m"])
def test_parameters_and_flops_are_those_counted_on_the_model_by_torch(name: str):
    table = anatomy.measured_counts(presets.preset(name).model)
    assert list(table["computed"]) == list(table["counted"])


def test_tensors_of_tinyllama_add_up_to_all_its_parameters():
    table = anatomy.tensor_table(presets.preset("tinyllama_1b").model)
    assert table["parameters"].sum() == 1_100_048_384
    assert table["share"].sum() == pytest.approx(1.0)
    gate = table[table["in a checkpoint"] == "model.layers.0.mlp.gate_proj.weight"].iloc[0]
    assert (gate["in memory"], gate["shape"], gate["times"]) == ("blocks.0.mlp.gate_up.weight", "5632 × 2048", 22)


def test_flops_of_tinyllama_by_formula_f_are_the_published_count():
    table = anatomy.flops_table({"TinyLlama": presets.preset("tinyllama_1b").model}).set_index("formula")
    assert table.loc["F", "TinyLlama (GFLOP)"] == pytest.approx(7.3138176)
