"""Probes: deterministic, balanced, answerable, from held-out documents, and readable by lm-eval itself."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from tinylab.data.shards.reader import ShardSet, open_shards
from tinylab.data.tokenizer.load import load_tokenizer_file
from tinylab.errors import DataError
from tinylab.evaluation.probes import (
    _PASSAGES,
    CHOICE_TOKENS,
    CONTEXT_TOKENS,
    PROBES,
    VERSION,
    build_probe,
    documents,
    word_overlap,
)


def build_probes(shards: ShardSet) -> dict[str, list[dict[str, Any]]]:
    return {task: build_probe(shards, task) for task in PROBES}


def test_word_overlap_is_the_share_of_items_that_shared_words_decide():
    context = "The cat sat, the cat ran."
    items = [
        {"context": context, "choices": ["A cat ran", "cat cat cat", "dogs", ""], "gold": 0},  # two words against one
        {"context": context, "choices": ["A cat ran", "the CAT", "dogs", ""], "gold": 1},  # two and two: half
        {"context": context, "choices": ["A cat", "a dog", "dogs", ""], "gold": 2},
        {"context": context, "choices": ["a", "b", "c", "d"], "gold": 3},  # none each: a quarter
    ]
    assert word_overlap(items) == (1 + 0.5 + 0 + 0.25) / 4


def test_the_right_answer_follows_its_context_in_the_held_out_document(lab):
    texts = {origin: text for text, origin in documents(lab.shards, load_tokenizer_file(lab.shards.tokenizer_path))}
    probes = build_probes(lab.shards)
    assert set(probes) == {"continuation", "code", "docstring"}
    for task, between, ending in (("continuation", " ", ".txt"), ("code", "\n", ".py")):
        for item in probes[task]:
            gold = item["choices"][item["gold"]]
            assert f"{item['context']}{between}{gold}" in texts[item["origin"]]
            for i, (choice, origin) in enumerate(zip(item["choices"], item["origins"], strict=True)):
                assert choice in texts[origin] and origin.endswith(ending)
                assert i == item["gold"] or origin != item["origin"]
    for item in probes["docstring"]:
        gold = item["choices"][item["gold"]]
        text = texts[item["origin"].rpartition(":")[0]]
        name = item["origin"].rpartition(" ")[2]
        assert f'def {name}(a, b):\n    """{gold}"""' in text and item["context"].startswith(f"def {name}(a, b):")
        assert not any(choice in item["context"] for choice in item["choices"]), "the docstring itself is left out"


def test_gold_positions_are_balanced_and_choices_differ(lab):
    for items in build_probes(lab.shards).values():
        counts = Counter(item["gold"] for item in items)
        assert set(counts) == {0, 1, 2, 3} and max(counts.values()) - min(counts.values()) <= 1
        assert all(len(set(item["choices"])) == 4 for item in items)
        assert len({item["id"] for item in items}) == len(items)


def test_items_fit_a_context_of_256_tokens(lab):
    tokenizer = load_tokenizer_file(lab.shards.tokenizer_path)
    for items in build_probes(lab.shards).values():
        for item in items:
            longest = max(len(tokenizer.encode(f"{item['context']} {c}")) for c in item["choices"])
            assert longest <= CONTEXT_TOKENS + CHOICE_TOKENS + 16 <= 256


def test_blocks_of_code_are_complete_lines_with_their_indent(lab):
    texts = {origin: text for text, origin in documents(lab.shards, load_tokenizer_file(lab.shards.tokenizer_path))}
    for item in build_probe(lab.shards, "code"):
        lines = texts[item["origin"]].split("\n")
        block = f"{item['context']}\n{item['choices'][item['gold']]}".split("\n")
        assert any(lines[i : i + len(block)] == block for i in range(len(lines)))


def test_sixteen_source_files_are_enough_for_150_items():
    texts = ((_source(i), f"package:p/{i}.py") for i in range(16))
    passages = list(_PASSAGES["code"](texts, cast(Any, _Words())))
    assert len({p.answer for p in passages}) >= 150 and len({p.document for p in passages}) == 16
    for passage in passages:
        assert 24 <= len(passage.answer.split()) <= CHOICE_TOKENS and len(passage.context.split()) <= CONTEXT_TOKENS


def test_a_line_longer_than_a_choice_does_not_end_a_document():
    text = "\n".join([*_source(0).split("\n"), "table = [" + "1, " * 200 + "]", *_source(1).split("\n")])
    plain = [p.answer for p in _PASSAGES["code"](iter([(_source(0), "a.py")]), cast(Any, _Words()))]
    answers = [p.answer for p in _PASSAGES["code"](iter([(text, "a.py")]), cast(Any, _Words()))]
    assert answers[: len(plain)] == plain and len(answers) > len(plain) and not any("table" in a for a in answers)


def _source(number: int) -> str:
    """240 lines of six words: 1,440 of these tokens, as a middling module has."""
    return "\n".join(f"value_{number}_{i} = call ( {i} )" for i in range(240))


class _Words:
    """A tokenizer of words between spaces."""

    def encode_batch(self, texts: list[str]) -> list[list[str]]:
        return [text.split() for text in texts]


def test_items_depend_only_on_the_data_and_the_seed(lab, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(lab.data, copy, ignore=shutil.ignore_patterns("probes"))
    shards = open_shards(copy)
    assert build_probes(shards) == build_probes(lab.shards)
    assert build_probe(shards, "continuation", seed=1) != build_probe(shards, "continuation")
    assert len(build_probe(shards, "continuation", n_items=24)) == 24


def test_the_error_for_a_split_that_is_too_small_has_its_number_of_items(lab, tmp_path):
    with pytest.raises(DataError, match=r"the probe continuation needs at least 20 items .* it has 7"):
        build_probe(lab.shards, "continuation", n_items=7)


def test_the_written_yaml_is_an_lm_eval_task_with_the_same_items(lab):
    from lm_eval.tasks import _yaml_loader as yaml_loader

    items = build_probe(lab.shards, "code")
    (path,) = (lab.data / "probes").glob("v*-n200-seed0/code.yaml")
    config = yaml_loader.load_yaml(path)
    assert config["output_type"] == "multiple_choice" and config["target_delimiter"] == "\n"
    assert {m["metric"] for m in config["metric_list"]} == {"acc", "acc_norm", "acc_mutual_info"}
    lines = Path(config["dataset_kwargs"]["data_files"]["validation"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == items


def test_items_are_built_again_if_the_folder_cannot_be_written(lab):
    items = build_probe(lab.shards, "code", n_items=24)
    folder = lab.data / "probes" / f"v{VERSION}-n24-seed0"
    shutil.rmtree(folder)
    (folder / "code.yaml").mkdir(parents=True)  # nothing can take its place
    assert build_probe(lab.shards, "code", n_items=24) == items and not (folder / "code.jsonl").exists()
