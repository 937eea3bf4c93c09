"""llama2.c's tokenizer files, written here as its export writes them, against its greedy merges written out by hand."""

from __future__ import annotations

import struct
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tinylab
from tinylab.cli.command import main
from tinylab.data.tokenizer.load import train_tokenizer
from tinylab.data.tokenizer.sentencepiece_model import Piece, parse
from tinylab.errors import CheckpointError, ConfigError
from tinylab.formats.convert import convert
from tinylab.formats.llama2c_tokenizer import find_tokenizer, read_tokenizer

VOCAB = 400
TEXTS = (
    "Once upon a time, there was a little girl.",
    "    def f(x):\n\treturn x  # 12,345",
    "   ",
    "",
    "naïve café \N{GRINNING FACE} \N{CJK UNIFIED IDEOGRAPH-6F22}",
    "a<s>b</s> <unk> <0x41>",
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Piece, ...]:
    """A trained vocabulary of 400 entries."""
    folder = tmp_path_factory.mktemp("trained")
    library = Path(sysconfig.get_paths()["stdlib"])
    train_tokenizer([(library / "json" / "decoder.py").read_text()], VOCAB).save(folder)
    return parse((folder / "tokenizer.model").read_bytes()).pieces


def exported(path: Path, pieces: tuple[Piece, ...], old: bool = False) -> list[tuple[bytes, float]]:
    """Write `path` as karpathy/llama2.c:tokenizer.py does. old: bytes as characters, as in older exports."""
    texts = [p.text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for p in pieces]
    texts[1:3] = "\n<s>\n", "\n</s>\n"
    if old:
        texts[3:259] = map(chr, range(256))
    entries = [(text.encode(), p.score) for text, p in zip(texts, pieces, strict=True)]
    data = struct.pack("I", max(len(text) for text, _ in entries))
    path.write_bytes(data + b"".join(struct.pack("fI", score, len(text)) + text for text, score in entries))
    return entries


def greedy(text: str, entries: list[tuple[bytes, float]]) -> list[int]:
    """run.c's encode: a space before the text, characters or their bytes, then the best pair again and again."""
    ids = {entry: i for i, (entry, _) in enumerate(entries) if i >= 259}
    tokens = [ids[b" "]] if text else []
    for character in text:
        whole = ids.get(character.encode())
        tokens += [whole] if whole is not None else [3 + byte for byte in character.encode()]
    while True:
        pairs = ((i, ids.get(entries[a][0] + entries[b][0])) for i, (a, b) in enumerate(pairwise(tokens)))
        known = [(i, token) for i, token in pairs if token is not None]
        if not known:
            return tokens
        at, token = max(known, key=lambda pair: entries[pair[1]][1])  # the leftmost of equal ones
        tokens[at : at + 2] = [token]


def write_model(path: Path, vocab_size: int = VOCAB) -> None:
    """A llama2.c model, version 0, of one layer, with a tied head and random weights."""
    C, F, T = 16, 24, 32
    count = vocab_size * C + 2 * C + 4 * C * C + 3 * C * F + C + T * (C // 2)
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.3
    path.write_bytes(struct.pack("7i", C, F, 1, 2, 2, vocab_size, T) + values.numpy().tobytes())


@pytest.mark.parametrize("old", [False, True])
def test_the_converted_tokenizer_gives_llama2cs_ids_and_the_model_generates(
    tmp_path: Path, pieces: tuple[Piece, ...], old: bool, capsys: pytest.CaptureFixture[str]
):
    write_model(tmp_path / "model.bin")
    entries = exported(tmp_path / f"tok{VOCAB}.bin", pieces, old)
    assert convert(tmp_path / "model.bin", tmp_path / "hf").tokenizer == f"tok{VOCAB}.bin"
    tokenizer = tinylab.load_tokenizer(tmp_path / "hf")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (VOCAB, 1, 2)
    for text in TEXTS:
        assert tokenizer.encode(text) == greedy(text, entries), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "def", "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out) > 1


def test_transformers_reads_the_converted_tokenizer(tmp_path: Path, pieces: tuple[Piece, ...]):
    from transformers import AutoTokenizer

    write_model(tmp_path / "model.bin")
    entries = exported(tmp_path / "tokenizer.bin", pieces)
    convert(tmp_path / "model.bin", tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == greedy(text, entries), text


def test_a_tokenizer_of_another_size_is_not_taken_and_refused_when_given(tmp_path: Path, pieces: tuple[Piece, ...]):
    write_model(tmp_path / "model.bin", 500)
    exported(tmp_path / "tokenizer.bin", pieces)
    assert find_tokenizer(tmp_path / "model.bin", 500) is None
    assert convert(tmp_path / "model.bin", tmp_path / "hf").tokenizer is None
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.bin must have one entry for each of the model's 500 ids; found 400"
    ):
        convert(tmp_path / "model.bin", tmp_path / "other", tokenizer=tmp_path / "tokenizer.bin")
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_for_what_cannot_take_it_is_wrong_usage(tmp_path: Path, pieces: tuple[Piece, ...]):
    write_model(tmp_path / "model.bin")
    exported(tmp_path / "t.bin", pieces)
    with pytest.raises(
        ConfigError, match=r"tokenizer is for a llama2\.c \.bin that becomes a folder; found .*tinyllama"
    ):
        convert(tmp_path / "model.bin", tmp_path / "m.pth", tokenizer=tmp_path / "t.bin")


def test_damaged_and_foreign_tokenizer_files_are_refused_by_name(tmp_path: Path, pieces: tuple[Piece, ...]):
    path = tmp_path / "tokenizer.bin"
    exported(path, pieces)
    data = path.read_bytes()
    swapped = list(pieces)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    exported(path, tuple(swapped))
    foreign = path.read_bytes()
    twice = list(pieces)
    twice[-1] = twice[-2]
    exported(path, tuple(twice))
    cases = {
        b"": "requires a buffer",
        data[:-1]: "claims .* bytes",
        data[:100]: "claims|requires|fewer",
        data[:4] + struct.pack("<fi", 0.0, -5) + data[12:]: "entry 0 claims -5 bytes",
        data[:4] + struct.pack("<fi", 0.0, 2**30) + data[12:]: "entry 0 claims 1073741824 bytes",
        foreign: "entry 10 is '<0x08>', not the byte <0x07>",
        path.read_bytes(): "two entries are equal",
    }
    for content, reason in cases.items():
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"tokenizer\.bin must be a tokenizer exported by llama2\.c.*({reason})"
        ):
            read_tokenizer(path, VOCAB)
