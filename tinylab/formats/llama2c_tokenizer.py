"""llama2.c's own tokenizer file (`tokenizer.bin`, `tok512.bin`), read as the SentencePiece model it was exported from.

The file is an int32, the largest number of bytes of a token, and then for each id a float32 score, an int32 length and
that many bytes. Its ids are those of a Llama tokenizer: `<unk>`, bos, eos, 256 bytes, then the pieces, with a space
where SentencePiece writes U+2581. Merges go by falling score, leftmost first, in both. Older exports have a byte's
character in place of `<0x0A>`. Source: karpathy/llama2.c:tokenizer.py (export), run.c (encode).
"""

import struct
from pathlib import Path

from tinylab.data.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Piece, SentencePieceModel
from tinylab.errors import CheckpointError

MAX_BYTES = 50_000_000
_SPECIAL = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
_FIRST_PIECE = len(_SPECIAL) + 256
_TRAINER = b"\x18\x02\x98\x02\x01"
"""Fields of the protocol buffer: model_type (3) is BPE (2), byte_fallback (35) is on."""
_NORMALIZER = b"\x0a\x08identity\x18\x01\x20\x00\x28\x01"
"""name (1) is identity; add_dummy_prefix (3) on, remove_extra_whitespaces (4) off, escape_whitespaces (5) on."""


def find_tokenizer(model_file: Path, vocab_size: int) -> Path | None:
    """The tokenizer file beside a llama2.c `.bin`: `tok<vocab_size>.bin`, or a `tokenizer.bin` of as many entries."""
    beside = (model_file.with_name(name) for name in (f"tok{vocab_size}.bin", "tokenizer.bin"))
    known = (path for path in beside if path.is_file() and path.name != model_file.name)
    return next((path for path in known if len(_entries(path)) == vocab_size), None)


def read_tokenizer(path: Path, vocab_size: int) -> SentencePieceModel:
    """The tokenizer in a llama2.c file, as the SentencePiece model of the same ids.

    Raises CheckpointError for a file that is damaged, of another kind, or not of `vocab_size` entries.
    """
    entries = _entries(path)
    if len(entries) != vocab_size:
        raise CheckpointError(
            f"{path} must have one entry for each of the model's {vocab_size} ids; found {len(entries)}. Give the "
            "tokenizer that the model was trained with"
        )
    pieces = [Piece(name, 0.0, kind) for name, kind in _SPECIAL]
    for value, (text, score) in enumerate(entries[len(_SPECIAL) : _FIRST_PIECE]):
        name = f"<0x{value:02X}>"
        if text not in (name, chr(value)):
            raise _another_kind(path, f"entry {value + len(_SPECIAL)} is {text!r}, not the byte {name}")
        pieces.append(Piece(name, score, BYTE))
    pieces += [Piece(text.replace(" ", SPACE), score, NORMAL) for text, score in entries[_FIRST_PIECE:]]
    if len({piece.text for piece in pieces}) < len(pieces) or not all(piece.text for piece in pieces):
        raise _another_kind(path, "two entries are equal, or one is empty")
    return SentencePieceModel(tuple(pieces), rest=((2, _TRAINER), (3, _NORMALIZER)))


def _entries(path: Path) -> list[tuple[str, float]]:
    entries: list[tuple[str, float]] = []
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} must be at most {MAX_BYTES} bytes; found {path.stat().st_size}")
        data = path.read_bytes()
        (longest,) = struct.unpack_from("<i", data)
        at = 4
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if not 0 <= length <= longest or at > len(data):
                raise ValueError(f"entry {len(entries)} claims {length} bytes")
            entries.append((data[at - length : at].decode(), score))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise _another_kind(path, str(error)) from None
    if len(entries) < _FIRST_PIECE:
        raise _another_kind(path, f"it has {len(entries)} entries, fewer than unk, bos, eos and the 256 bytes")
    return entries


def _another_kind(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} must be a tokenizer exported by llama2.c; found another file: {reason}")
