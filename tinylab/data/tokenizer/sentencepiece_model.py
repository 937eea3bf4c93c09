"""SentencePiece models as data: read and write the file, train one as Llama's was, rebuild it for `tokenizers`.

The file is one protocol buffer (google/sentencepiece:src/sentencepiece_model.proto). The few fields that
matter here are read directly, because the sentencepiece package has no access to them without protobuf.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinylab.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # U+2581, what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
CHARACTER_COVERAGE = 0.9995
"""Share of the sample's characters that get a piece of their own; the rest is spelled in bytes (Llama's value)."""
MAX_LINE = 4000
"""Characters of a training sentence; SentencePiece drops sentences over 4,192 bytes by default."""


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary: its text, score (merges go by falling score) and type (NORMAL … BYTE)."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a `tokenizer.model`; `pieces` are in the order of their ids."""

    pieces: tuple[Piece, ...]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bool = False
    """Whether characters are rewritten (nmt_nfkc and the like); Llama's rule is `identity`."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_suffix: bool = False
    rest: tuple[tuple[int, bytes], ...] = ()
    """Every other field of the file, as (number, payload), kept for writing."""

    def why_not_rebuilt(self) -> str | None:
        """Why the recipe of `rebuild` does not apply to this model; None where it does."""
        if self.model_type != BPE:
            return f"it is not a BPE model (model_type {self.model_type}; 1 is unigram)"
        if self.charsmap or self.remove_extra_whitespaces or not self.escape_whitespaces:
            return "its normalizer rewrites text, which Llama's does not"
        if self.whitespace_suffix or not self.add_dummy_prefix:
            return "it does not put one space before the text, as Llama's does"
        return None


def parse(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a `tokenizer.model`. Raises DataError when they are none."""
    pieces: list[Piece] = []
    rest: list[tuple[int, bytes]] = []
    settings: dict[str, int | bool] = {}
    try:
        for number, payload in _fields(data):
            if not isinstance(payload, bytes):
                raise ValueError(f"field {number} is not a message")
            if number == 1:
                values = dict(_fields(payload))
                text, score, kind = values[1], values.get(2, 0.0), values.get(3, NORMAL)
                if not isinstance(text, bytes) or isinstance(score, bytes) or not isinstance(kind, int):
                    raise ValueError(f"a piece with fields of other types: {values}")
                pieces.append(Piece(text.decode(), float(score), kind))
                continue
            rest.append((number, payload))
            values = dict(_fields(payload))
            if number == 2:
                settings["model_type"] = int(values.get(3, UNIGRAM))
                settings["whitespace_suffix"] = bool(values.get(24, 0))
                settings["byte_fallback"] = bool(values.get(35, 0))
            elif number == 3:
                settings["charsmap"] = bool(values.get(2, b""))
                settings["add_dummy_prefix"] = bool(values.get(3, 1))
                settings["remove_extra_whitespaces"] = bool(values.get(4, 1))
                settings["escape_whitespaces"] = bool(values.get(5, 1))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise DataError(f"a SentencePiece model must be one protocol buffer; found {error!r}") from error
    if not pieces:
        raise DataError("a SentencePiece model must have pieces; found none: the file is empty or of another kind")
    return SentencePieceModel(tuple(pieces), rest=tuple(rest), **settings)  # type: ignore[arg-type]


def serialize(model: SentencePieceModel) -> bytes:
    """The bytes of the file; `parse(serialize(m)) == m` for what `parse` returned."""
    out = bytearray()
    for piece in model.pieces:
        text = piece.text.encode()
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
        if piece.type != NORMAL:
            body += b"\x18" + _varint(piece.type)
        out += b"\x0a" + _varint(len(body)) + body
    for number, payload in model.rest:
        out += _varint(number << 3 | 2) + _varint(len(payload)) + payload
    return bytes(out)


def rebuild(model: SentencePieceModel) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library, by a recipe that leads to SentencePiece's ids.

    For models of which `why_not_rebuilt` is None.
    Merges come from all splits of each piece into two pieces of the vocabulary, by falling score; of equal scores the
    longer piece goes first, then the lower id. Ordering all merges by id instead (transformers' conversion) is wrong
    for Llama's file, whose runs of spaces share the lowest score, -1e9, at the lowest ids. SentencePiece takes the
    leftmost of equal pairs, so it lengthens one run as far as it can: longest first does that too (12 of 12 random
    sets of run lengths and ids; by id 6 of 12). No theorem: the caller compares ids with SentencePiece's.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {piece.text: i for i, piece in enumerate(model.pieces)}
    ids = {p.text: i for i, p in enumerate(model.pieces) if p.type in (NORMAL, USER_DEFINED, UNUSED)}
    ranked: list[tuple[float, int, int, int, int, str, str]] = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-model.pieces[i].score, -len(text), i, ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = next((p.text for p in model.pieces if p.type == UNKNOWN), None)
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [p.text for p in model.pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    user = [p.text for p in model.pieces if p.type == USER_DEFINED]
    if user:
        tokenizer.add_tokens([tokenizers.AddedToken(t, special=False, normalized=True) for t in user])
    return tokenizer


def train(texts: Iterable[str], vocab_size: int) -> SentencePieceModel:
    """A Llama-style BPE of exactly `vocab_size` entries: unk, bos, eos, 256 bytes, merges by rank, characters.

    As Llama's: byte fallback, identity normalization, one space before the text, digits apart, whitespace-only
    pieces merged last (Llama gives them the score -1e9), newlines in bytes. Unlike Llama's, ids follow the
    scores, so that conversions which order merges by id are right too. The same texts give the same model.
    Raises DataError when the texts are too small for so many entries.
    """
    import sentencepiece

    if vocab_size < 260:
        raise DataError(
            f"a byte-fallback vocabulary must have at least 260 entries (3 special, 256 bytes, 1 piece); "
            f"found {vocab_size}: set data.vocab_size and model.vocab_size higher"
        )
    sizes: list[int] = []
    lines = _lines(texts, sizes)
    first = next(lines, None)
    if first is None:
        raise DataError("training a tokenizer needs text; found none")
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=itertools.chain([first], lines),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=8 * MAX_LINE,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _does_not_fit(vocab_size, sum(sizes), str(error)) from error
    return _whitespace_last(parse(buffer.getvalue()))


def _lines(texts: Iterable[str], sizes: list[int]) -> Iterator[str]:
    """The non-empty lines of texts, in pieces of up to MAX_LINE characters; `sizes` receives each text's bytes."""
    for text in texts:
        sizes.append(len(text.encode()))
        for line in text.replace("\0", "\n").split("\n"):
            for start in range(0, len(line), MAX_LINE):
                yield line[start : start + MAX_LINE]


def _does_not_fit(vocab_size: int, n_bytes: int, reason: str) -> DataError:
    """What to do when SentencePiece finds too few pieces, or more characters than entries."""
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
    if least:
        return DataError(
            f"data.vocab_size must have room for every common character of the text, at least {least[1]} entries; "
            f"found {vocab_size}: set data.vocab_size and model.vocab_size to {least[1]} or more"
        )
    most = re.search(r"value <= (\d+)", reason)
    found = f"at most {most[1]} entries come of it" if most else reason
    # 20 kB of Python sources yield 3,700 entries, 100 kB yield 4,096 (repetitive text gives fewer).
    needed = max(vocab_size * 25, 2 * n_bytes)
    return DataError(
        f"the text must be varied enough for a vocabulary of {vocab_size} entries; found {n_bytes:,} bytes: {found}. "
        f"Take about {needed:,} bytes or more (data.sources, limit_mb), "
        "or set data.vocab_size and model.vocab_size lower"
    )


def _whitespace_last(model: SentencePieceModel) -> SentencePieceModel:
    """The model with runs of spaces behind all other merges, in ids and scores: `▁▁▁`, `▁import`, as Llama cuts it."""
    fixed = [p for p in model.pieces if p.type != NORMAL]
    merged = [p for p in model.pieces if p.type == NORMAL and len(p.text) > 1]
    runs = [p for p in merged if not p.text.strip(SPACE)]
    words = [p for p in merged if p.text.strip(SPACE)]
    characters = [p for p in model.pieces if p.type == NORMAL and len(p.text) == 1]
    ranked = [replace(p, score=float(-i)) for i, p in enumerate([*words, *runs, *characters])]
    return replace(model, pieces=(*fixed, *ranked))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of one protocol-buffer message: integers, 32-bit floats, raw bytes."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _read_varint(data, position)
        elif kind == 2:
            size, position = _read_varint(data, position)
            if position + size > len(data):
                raise ValueError(f"a field of {size} bytes, {len(data) - position} left")
            value, position = data[position : position + size], position + size
        elif kind == 5:
            (value,), position = struct.unpack_from("<f", data, position), position + 4
        elif kind == 1:
            (value,), position = struct.unpack_from("<d", data, position), position + 8
        else:
            raise ValueError(f"wire type {kind} at byte {position}")
        yield key >> 3, value


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
