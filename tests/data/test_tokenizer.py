"""Tokenizers: ids equal to the reference's, text that comes back, and a word when a fast path is refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinylab.data import sentencepiece_model as spm
from tinylab.data.adversarial import SAMPLE
from tinylab.data.encoding import Tokenizer
from tinylab.data.tokenizer import fetch_tokenizer, load_tokenizer_file, train_tokenizer
from tinylab.errors import DataError

VOCAB = 1200
LIBRARY = Path(json.__file__).parent.parent


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 600 kB of the standard library's sources."""
    names = (
        "argparse.py",
        "ast.py",
        "datetime.py",
        "inspect.py",
        "json/decoder.py",
        "logging/__init__.py",
        "typing.py",
    )
    return [(LIBRARY / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, VOCAB)


@pytest.fixture(scope="session")
def sp_model(texts: list[str]) -> bytes:
    """A BPE model from SentencePiece's own trainer, byte fallback as in Llama's file, ids in the order of scores."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return model.getvalue()


def sentencepiece_ids(model: bytes, documents: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.encode(documents)


def random_texts(n: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    alphabet = [*" \t\n  _().:=\"'#0123456789abcdefghij", "    ", "self", "import ", "return", "é", "中", "😀", "\0"]
    return ["".join(source.choices(alphabet, k=source.randrange(60))) for _ in range(n)]


def ids_of(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(documents)]


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
        "import json, sys; from tinylab.data.tokenizer import train_tokenizer\n"
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


def whitespace_last(sp_model: bytes) -> bytes:
    """The model as Llama's file is: runs of 2–16 spaces, the common ones at low ids, all with the score -1e9."""
    model = spm.parse(sp_model)
    pieces = list(model.pieces)
    runs = {p.text for p in pieces if len(p.text) > 1 and not p.text.strip("▁")}
    rarest = [i for i, p in enumerate(pieces) if p.type == spm.NORMAL and len(p.text) > 1 and p.text not in runs]
    for length in range(2, 17):
        if "▁" * length not in runs:
            pieces[rarest.pop()] = spm.Piece("▁" * length, 0.0)
    pieces = [replace(p, score=-1e9) if len(p.text) > 1 and not p.text.strip("▁") else p for p in pieces]
    assert sum(p.score == -1e9 for p in pieces) == 15 and pieces.index(spm.Piece("▁▁", -1e9)) < 270
    return spm.serialize(replace(model, pieces=tuple(pieces)))


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


def test_a_wrong_tokenizer_json_beside_a_model_is_replaced_with_a_note(sp_model, tmp_path):
    edited = whitespace_last(sp_model)
    (tmp_path / "tokenizer.model").write_bytes(edited)
    (tmp_path / "tokenizer.json").write_text(spm.rebuild(spm.parse(sp_model)).to_str())
    loaded = load_tokenizer_file(tmp_path)
    assert len(loaded.notes) == 1 and "tokenizer.json: tokenizers gives other ids than sentencepiece" in loaded.notes[0]
    assert ids_of(loaded, list(SAMPLE)) == sentencepiece_ids(edited, list(SAMPLE))


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
    assert loaded.backend == "sentencepiece" and "no BPE model" in loaded.notes[0]
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (2000, 1, 2)
    assert ids_of(loaded, list(SAMPLE)) == sentencepiece_ids(file.read_bytes(), list(SAMPLE))
    loaded.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]
    again = load_tokenizer_file(tmp_path)
    assert again.hash == loaded.hash and again.encode("Hello world") == loaded.encode("Hello world")


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_gives_the_same_ids_from_a_saved_folder(trained, texts, tmp_path, with_config):
    import transformers

    trained.save(tmp_path)
    if with_config:  # as in a checkpoint: the model type must not bring in another tokenizer
        (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SAMPLE, *texts[:2]]:
        assert theirs.encode(text, add_special_tokens=False) == trained.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos_id, trained.eos_id)


def test_transformers_gives_sentencepieces_ids_where_its_own_conversion_would_not(sp_model, texts, tmp_path):
    import transformers

    edited = whitespace_last(sp_model)
    (tmp_path / "tokenizer.model").write_bytes(edited)
    load_tokenizer_file(tmp_path).save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [theirs.encode(t, add_special_tokens=False) for t in texts] == sentencepiece_ids(edited, texts)


def test_saving_and_loading_keeps_identity_and_ids(trained, shared, tmp_path):
    for tokenizer in (trained, load_tokenizer_file(shared / "tokenizers/torchtitan_test_tokenizer")):
        folder = tmp_path / str(tokenizer.vocab_size)
        tokenizer.save(folder)
        again = load_tokenizer_file(folder)
        assert (again.hash, again.bos_id, again.eos_id) == (tokenizer.hash, tokenizer.bos_id, tokenizer.eos_id)
        assert ids_of(again, list(SAMPLE)) == ids_of(tokenizer, list(SAMPLE))


def test_the_hash_sees_the_order_of_merges(trained, tmp_path):
    trained.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = data["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer_file(tmp_path / "tokenizer.json").hash != trained.hash


def test_a_file_that_leaves_parts_out_or_writes_merges_in_the_old_way_is_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert load_tokenizer_file(tmp_path / "old.json").hash == trained.hash

    (tmp_path / "short.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []}}')
    short = load_tokenizer_file(tmp_path / "short.json")
    assert (short.vocab_size, short.bos_id, short.eos_id) == (3, None, None) and short.encode("ba") == [1, 0]
    assert all("\n" not in note for note in short.notes)


def test_no_setting_of_a_file_cuts_or_fills_a_text(trained, texts, tmp_path):
    trained.save(tmp_path)
    wrong = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wrong.enable_truncation(5)
    wrong.enable_padding(length=9)
    wrong.save(str(tmp_path / "cuts.json"))
    loaded = load_tokenizer_file(tmp_path / "cuts.json")
    assert ids_of(loaded, ["a", *texts]) == ids_of(trained, ["a", *texts])
    assert not loaded.notes  # the slower engine agrees


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


def test_a_model_file_is_read_and_written_without_loss(sp_model):
    model = spm.parse(sp_model)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(spm.serialize(model))
    assert spm.parse(spm.serialize(model)) == model and model.byte_fallback and model.model_type == spm.BPE
    for i, piece in enumerate(model.pieces):
        assert (processor.id_to_piece(i), processor.get_score(i)) == (piece.text, pytest.approx(piece.score))
        assert processor.is_byte(i) == (piece.type == spm.BYTE)


def test_too_little_text_says_how_much_there_is_and_what_to_do(texts):
    with pytest.raises(
        DataError, match=r"vocabulary of 4096 entries; found 2,000 bytes: they give at most \d+\. Give about"
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


def test_files_that_are_no_tokenizer_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "other.json").write_text('{"version": "1.0"}')
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff")
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in (
        ("deep.json", r"deep\.json must be JSON; found: maximum recursion depth"),
        ("tokenizer.json", r"tokenizer\.json must be JSON"),
        ("other.json", r"other\.json: tokenizer\.json must be a tokenizer of the `tokenizers` library"),
        ("bad.model", r"bad\.model: a SentencePiece model must be one protocol buffer"),
        ("empty", r"empty must be or hold tokenizer\.json or tokenizer\.model; found neither"),
        ("nowhere", r"found nothing at .*nowhere"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer_file(tmp_path / name)


def test_a_hub_id_out_of_reach_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"tokenizer nobody/nothing must be .* a Hub id that can be reached.*local copy"
    ):
        fetch_tokenizer("nobody/nothing")


def test_a_hub_id_is_loaded_from_the_cache(trained, monkeypatch, tmp_path):
    import huggingface_hub

    def snapshot_download(name, revision=None, allow_patterns=None):
        assert (name, revision) == ("owner/name", "v1")
        return str(tmp_path / "snapshot")

    trained.save(tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch_tokenizer("owner/name@v1").hash == trained.hash
