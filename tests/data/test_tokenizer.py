"""Tokenizers: ids equal to the reference's, text that comes back, and a word when a fast path is refused."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylab.data.tokenizer import sentencepiece_model as spm
from tinylab.data.tokenizer.adversarial import SAMPLE
from tinylab.data.tokenizer.load import load_tokenizer_file, train_tokenizer
from tinylab.errors import DataError

from .reference_ids import VOCAB, ids_of, sentencepiece_ids, whitespace_last


def random_texts(n: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    alphabet = [*" \t\n  _().:=\"'#0123456789abcdefghij", "    ", "self", "import ", "return", "é", "中", "😀", "\0"]
    return ["".join(source.choices(alphabet, k=source.randrange(60))) for _ in range(n)]


def test_a_trained_vocabulary_is_laid_out_as_llamas(trained):
    model = spm.parse(trained._model)
    assert trained.vocab_size == VOCAB == len(model.pieces)
    assert [p.text for p in model.pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [p.text for p in model.pieces[3:259]] == [f"<0x{i:02X}>" for i in range(256)]
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    words = [p.text for p in model.pieces[259:]]
    assert not [w for w in words if len(w) > 1 and any(c.isdigit() for c in w)]
    assert not [w for w in words if "\n" in w]


def test_an_indent_leaves_its_last_space_to_the_word(trained):
    ids = trained.encode("\n    import os")
    pieces = [spm.parse(trained._model).pieces[i].text for i in ids]
    word = pieces.index("▁import")
    assert "".join(pieces[2:word]) == "▁▁▁" and pieces[:2] == ["▁", "<0x0A>"]


def test_training_gives_the_same_tokenizer_in_another_process(trained, texts, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys; from tinylab.data.tokenizer.load import train_tokenizer\n"
        f"print(train_tokenizer(json.load(open(sys.argv[1])), {VOCAB}).hash)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "texts.json")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == trained.hash


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_adversarial_text_comes_back_but_for_the_space_mark(trained):
    for text in SAMPLE:
        assert trained.decode(trained.encode(text)) == text.replace("▁", " ")


def test_trained_ids_are_sentencepieces_own(trained, texts, tmp_path):
    trained.save(tmp_path)
    documents = [*SAMPLE, *texts, *random_texts(500)]
    assert ids_of(trained, documents) == sentencepiece_ids((tmp_path / "tokenizer.model").read_bytes(), documents)
    assert trained.backend == "gigatoken" and not trained.notes


def test_a_sentencepiece_model_is_rebuilt_with_its_own_ids(sp_model, texts, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sp_model)
    loaded = load_tokenizer_file(tmp_path / "tokenizer.model")
    documents = [*SAMPLE, *texts, *random_texts(500, seed=1)]
    assert loaded.backend in ("gigatoken", "tokenizers")
    assert ids_of(loaded, documents) == sentencepiece_ids(sp_model, documents)


def test_low_scores_at_low_ids_do_not_change_the_ids_as_they_do_when_merges_follow_ids(sp_model, texts, tmp_path):
    edited = whitespace_last(sp_model)
    (tmp_path / "tokenizer.model").write_bytes(edited)
    documents = [*SAMPLE, *texts]
    expected = sentencepiece_ids(edited, documents)
    loaded = load_tokenizer_file(tmp_path)
    assert loaded.backend != "sentencepiece" and not loaded.notes
    assert ids_of(loaded, documents) == expected

    pieces = spm.parse(edited).pieces  # the wrong conversion: the same merges in the order of ids
    by_id = replace(spm.parse(edited), pieces=tuple(replace(p, score=float(-i)) for i, p in enumerate(pieces)))
    wrong = spm.rebuild(by_id)
    wrong.encode_special_tokens = True
    differing = [e.ids != ids for e, ids in zip(wrong.encode_batch(documents), expected, strict=True)]
    assert sum(differing[len(SAMPLE) :]) == len(texts), "the trap must be there for this test to mean something"


@pytest.mark.parametrize("seed", range(6))
def test_equal_scores_are_merged_as_sentencepiece_merges_them(sp_model, texts, tmp_path, seed):
    model, source = spm.parse(sp_model), random.Random(seed)
    pieces = [p for p in model.pieces if p.type != spm.NORMAL or len(p.text) == 1 or p.text.strip("▁")]
    for length in source.sample(range(2, 17), source.randrange(3, 16)):
        pieces.insert(source.randrange(259, 500), spm.Piece("▁" * length, -1e9))
    edited = spm.serialize(replace(model, pieces=tuple(pieces)))
    rebuilt = spm.rebuild(spm.parse(edited))
    rebuilt.encode_special_tokens = True
    documents = [*SAMPLE, *texts, *(" " * n + "x" for n in range(130)), *random_texts(200, seed)]
    ids = [e.ids for e in rebuilt.encode_batch(documents, add_special_tokens=False)]
    assert ids == sentencepiece_ids(edited, documents)


def test_sentencepiece_itself_encodes_when_the_rebuilt_tokenizer_differs(sp_model, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(sp_model)
    original = spm.rebuild

    def backwards(model: spm.SentencePieceModel) -> tokenizers.Tokenizer:
        return original(replace(model, pieces=tuple(replace(p, score=-p.score) for p in model.pieces)))

    monkeypatch.setattr(spm, "rebuild", backwards)
    loaded = load_tokenizer_file(tmp_path)
    assert loaded.backend == "sentencepiece" and loaded.notes[-1] == "using sentencepiece"
    assert ids_of(loaded, list(SAMPLE)) == sentencepiece_ids(sp_model, list(SAMPLE))


def test_a_fast_engine_that_differs_on_a_document_is_given_up_with_a_note(trained, monkeypatch):
    copy = pickle.loads(pickle.dumps(trained))
    honest = copy._encode_gigatoken
    monkeypatch.setattr(
        copy,
        "_encode_gigatoken",
        lambda batch: [[0] if "odd one" in t else i for t, i in zip(batch, honest(batch), strict=True)],
    )
    assert copy.check(["even", "plain"]).backend == "gigatoken"
    copy.check(["even", "the odd one"])
    assert (
        copy.backend == "tokenizers"
        and "gigatoken gives other ids than sentencepiece for 'the odd one'" in copy.notes[0]
    )
    assert copy.encode("the odd one") == trained.encode("the odd one")


def library_ids(file: Path, documents: list[str]) -> list[list[int]]:
    reference = tokenizers.Tokenizer.from_file(str(file))
    reference.encode_special_tokens = True
    return [reference.encode(d, add_special_tokens=False).ids for d in documents]


@pytest.mark.parametrize(
    ("name", "size", "bos", "eos"),
    [("torchtitan_test_tokenizer/tokenizer.json", 2020, 2002, 2003), ("pythia_20b/20B_tokenizer.json", 50277, 0, 0)],
)
def test_byte_level_tokenizers_give_the_ids_of_their_library(shared, texts, name, size, bos, eos):
    file = shared / "tokenizers" / name
    loaded = load_tokenizer_file(file)
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (size, bos, eos)
    documents = [*SAMPLE, *texts, *random_texts(300, seed=2)]
    assert ids_of(loaded, documents) == library_ids(file, documents)


def test_pythias_tokens_count_the_bytes_of_the_text(shared, texts):
    loaded = load_tokenizer_file(shared / "tokenizers/pythia_20b/20B_tokenizer.json")
    for text in texts:
        assert loaded.token_bytes()[loaded.encode(text)].sum() == len(text.encode())


def test_an_incomplete_byte_alphabet_is_refused_by_the_fast_engine_with_a_note(shared):
    loaded = load_tokenizer_file(shared / "tokenizers/torchtitan_test_tokenizer")
    assert loaded.backend == "tokenizers" and "gigatoken refuses this tokenizer" in loaded.notes[0]


def test_a_unigram_model_is_encoded_by_sentencepiece_with_a_note(shared, tmp_path):
    file = shared / "tokenizers/sentencepiece_m/m.model"
    loaded = load_tokenizer_file(file)
    assert loaded.backend == "sentencepiece" and "not a BPE model" in loaded.notes[0]
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (2000, 1, 2)
    assert ids_of(loaded, list(SAMPLE)) == sentencepiece_ids(file.read_bytes(), list(SAMPLE))
    loaded.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    again = load_tokenizer_file(tmp_path)
    assert again.hash == loaded.hash and again.encode("Hello world") == loaded.encode("Hello world")


def test_special_tokens_in_a_text_are_text(trained):
    ids = trained.encode("<s>a</s><unk>")
    assert not {0, 1, 2} & set(ids)
    assert trained.decode(ids) == "<s>a</s><unk>"
    assert trained.decode([1, *trained.encode("a"), 2]) == "a"


def test_token_bytes_sum_to_the_text_and_one_leading_space(trained, texts):
    sizes = trained.token_bytes()
    assert sizes.shape == (VOCAB,) and sizes.dtype == np.int64
    assert not sizes[[0, 1, 2]].any() and (sizes[3:] > 0).all()
    for text in [*SAMPLE[1:], *texts]:
        plain = text.replace("▁", " ")
        assert sizes[trained.encode(plain)].sum() == len(plain.encode()) + 1


def test_threads_and_copies_give_the_same_ids(trained, texts):
    copy = pickle.loads(pickle.dumps(trained))
    expected = ids_of(trained, texts)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: ids_of(copy, texts), range(8)):
            assert found == expected
    assert copy.hash == trained.hash and copy.encode_batch([]) == []


def test_too_little_text_says_how_much_there_is_and_what_to_do(texts):
    with pytest.raises(
        DataError, match=r"vocabulary of 4096 entries; found 2,000 bytes: at most \d+ entries come of it\. Take about"
    ):
        train_tokenizer([texts[0][:2000]], 4096)
    with pytest.raises(
        DataError, match=r"room for every common character of the text, at least \d+ entries; found 300"
    ):
        train_tokenizer(texts, 300)
    with pytest.raises(DataError, match=r"at least 260 entries .* found 100"):
        train_tokenizer(texts, 100)
    with pytest.raises(DataError, match=r"needs text; found none"):
        train_tokenizer([], 300)
