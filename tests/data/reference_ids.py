"""The reference of the tokenizer tests: SentencePiece's own ids, and a model with the trap of Llama's file in it."""

from __future__ import annotations

from dataclasses import replace

import sentencepiece

from tinylab.data.tokenizer import sentencepiece_model as spm
from tinylab.data.tokenizer.encode import Tokenizer

VOCAB = 1200


def sentencepiece_ids(model: bytes, documents: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.encode(documents)


def ids_of(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(documents)]


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
