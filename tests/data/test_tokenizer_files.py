"""Tokenizer files: what was saved is the same tokenizer, to transformers too; what is no tokenizer is named."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece
import tokenizers

from tinylab.data.tokenizer import sentencepiece_model as spm
from tinylab.data.tokenizer.adversarial import SAMPLE
from tinylab.data.tokenizer.load import fetch_tokenizer, load_tokenizer_file
from tinylab.errors import DataError

from .reference_ids import ids_of, sentencepiece_ids, whitespace_last


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


def test_a_model_file_is_read_and_written_without_loss(sp_model):
    model = spm.parse(sp_model)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(spm.serialize(model))
    assert spm.parse(spm.serialize(model)) == model and model.byte_fallback and model.model_type == spm.BPE
    for i, piece in enumerate(model.pieces):
        assert (processor.id_to_piece(i), processor.get_score(i)) == (piece.text, pytest.approx(piece.score))
        assert processor.is_byte(i) == (piece.type == spm.BYTE)


def test_a_wrong_tokenizer_json_beside_a_model_is_replaced_with_a_note(sp_model, tmp_path):
    edited = whitespace_last(sp_model)
    (tmp_path / "tokenizer.model").write_bytes(edited)
    (tmp_path / "tokenizer.json").write_text(spm.rebuild(spm.parse(sp_model)).to_str())
    loaded = load_tokenizer_file(tmp_path)
    assert len(loaded.notes) == 1 and "tokenizer.json: tokenizers gives other ids than sentencepiece" in loaded.notes[0]
    assert ids_of(loaded, list(SAMPLE)) == sentencepiece_ids(edited, list(SAMPLE))


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


def test_files_that_are_no_tokenizer_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "other.json").write_text('{"version": "1.0"}')
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff")
    (tmp_path / "refused.model").write_bytes(spm.serialize(spm.SentencePieceModel((spm.Piece("a", 0.0),))))
    (tmp_path / "hollow.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (tmp_path / "words.json").write_text(json.dumps({"model": words}))
    (tmp_path / "wide.json").write_bytes('{"model": 1}'.encode("utf-16"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in (
        ("deep.json", r"deep\.json must be JSON; found: maximum recursion depth"),
        ("tokenizer.json", r"tokenizer\.json must be JSON"),
        ("other.json", r"other\.json: tokenizer\.json must be a tokenizer of the `tokenizers` library"),
        ("bad.model", r"bad\.model: a SentencePiece model must be one protocol buffer"),
        ("refused.model", r"refused\.model: tokenizer\.model must be a model that SentencePiece accepts; .*Restore"),
        ("hollow.json", r"hollow\.json must hold a tokenizer that encodes text; found: .*Restore its files"),
        ("words.json", r"words\.json must hold a tokenizer that encodes text; found: .*Restore its files"),
        ("wide.json", r"wide\.json must hold a tokenizer that encodes text; found: .*Restore its files"),
        ("empty", r"empty must be or hold tokenizer\.json or tokenizer\.model; found neither"),
        ("nowhere", r"found nothing at .*nowhere"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer_file(tmp_path / name)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_replacements_that_blow_a_text_up_are_refused_before_they_run(trained, tmp_path, part):
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text())
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12
    parts[part] = {"type": "Sequence", {"normalizer": "normalizers", "decoder": "decoders"}[part]: steps}
    file.write_text(json.dumps(parts))
    with pytest.raises(DataError, match=r"tokenizer\.json must not make a text .* may make it 1e\+12 times longer"):
        load_tokenizer_file(file)


def test_an_endless_file_is_refused_without_reading_it(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"tokenizer\.json must be a file of at most 200,000,000 bytes"):
        load_tokenizer_file(tmp_path)


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
