"""Text to ids and back, fast, with ids that were compared with the reference.

One class uses three engines. `sentencepiece` is the reference where there is a `tokenizer.model`; `tokenizers` runs
a `tokenizer.json`; `gigatoken` is the fast path. An engine is used only after it has returned the reference's ids for
the strings of adversarial.py; `notes` says which engine was rejected, and on which string.
Documents are plain text: `<s>` in a text is three characters, never the id of a special token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylab.data.tokenizer import sentencepiece_model as spm
from tinylab.data.tokenizer.adversarial import SAMPLE
from tinylab.errors import DataError
from tinylab.runs.durable import disk_error

JSON_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
_KEPT_SETTINGS = ("model_max_length", "chat_template", "pad_token", "unk_token", "add_bos_token", "add_eos_token")


class Tokenizer:
    """Text to ids and back. Made by load.py; can be pickled and shared by threads.

    `vocab_size`: one more than the largest id. `bos_id`, `eos_id`: None where there is none. `hash`: SHA-256 over
    ids, pieces, merges and normalizer. `backend`: the engine that encodes. `notes`: engines rejected, and why.
    """

    def __init__(
        self, *, json_text: str | None = None, model: bytes | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        if json_text is None and model is None:
            raise DataError("a tokenizer must have a tokenizer.json or a tokenizer.model; found neither")
        self._json, self._model, self._settings = json_text, model, settings or {}
        self.notes: list[str] = []
        self._start()
        self.backend = "sentencepiece" if json_text is None else "tokenizers"
        self._read_vocabulary()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Never adds or recognises special tokens."""
        return self._engine(self.backend)([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64, encoded in parallel where the engine can."""
        return [np.asarray(ids, dtype=np.int64) for ids in self._engine(self.backend)(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        wanted = [int(i) for i in ids if int(i) not in self._silent]
        if self._tokenizers is None:
            return self._sentencepiece.decode(wanted)
        return self._tokenizers.decode(wanted, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for: (V,) int64, special tokens 0.

        A `▁` counts as its one space, so a Llama-style encoding of a text sums to one byte more than the text.
        """
        return self._token_bytes.copy()

    def check(self, texts: Sequence[str]) -> Tokenizer:
        """Compare the engine with the reference on `texts`; drop engines that differ, with a note. Returns itself."""
        reference = "sentencepiece" if self._sentencepiece else "tokenizers"
        wanted = self._engine(reference)(texts)
        while self.backend != reference:
            different = _first_difference(texts, self._engine(self.backend)(texts), wanted)
            if different is None:
                break
            slower = "tokenizers" if self.backend == "gigatoken" else "sentencepiece"
            self.notes.append(f"{self.backend} gives other ids than {reference} for {different}; using {slower}")
            self.backend = slower
            if slower == "sentencepiece":  # the only right engine: the rebuilt tokenizer.json is dropped
                self._json = self._tokenizers = None
                self._read_vocabulary()
        return self

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where there is one, tokenizer.model.

        `transformers.AutoTokenizer.from_pretrained(folder)` then encodes to the same ids (add_special_tokens=False).
        Only SentencePiece can run some models (unigram): these are saved as tokenizer.model alone.
        """
        folder = Path(folder)
        settings = {k: v for k, v in self._settings.items() if k in _KEPT_SETTINGS}
        # Not LlamaTokenizerFast: transformers would build its own tokenizer from the vocabulary and ignore the file.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
        settings["clean_up_tokenization_spaces"] = False
        for name, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if i is not None:
                tokens = self._tokenizers
                settings[name] = tokens.id_to_token(i) if tokens else self._sentencepiece.id_to_piece(i)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._json is not None:
                (folder / JSON_FILE).write_text(self._json, encoding="utf-8")
                (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
            if self._model is not None:
                (folder / MODEL_FILE).write_bytes(self._model)
        except OSError as error:
            raise DataError(str(disk_error(folder, error))) from error

    def accelerate(self) -> Tokenizer:
        """Take gigatoken as the engine if it agrees with `tokenizers` on the sample. Returns itself."""
        if self.backend != "tokenizers":
            return self
        try:
            fast = self._engine("gigatoken")(SAMPLE)
        except BaseException as error:  # its panics are not Exceptions; whatever it raises, the slower engine works
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.notes.append(f"gigatoken refuses this tokenizer ({reason}); using tokenizers")
            return self
        different = _first_difference(SAMPLE, fast, self._engine("tokenizers")(SAMPLE))
        if different is None:
            self.backend = "gigatoken"
        else:
            self.notes.append(f"gigatoken gives other ids than tokenizers for {different}; using tokenizers")
        return self

    def __getstate__(self) -> dict[str, Any]:
        engines = ("_lock", "_gigatoken", "_tokenizers", "_sentencepiece")
        return {k: v for k, v in self.__dict__.items() if k not in engines}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, backend={self.backend!r}, hash={self.hash[:12]!r})"

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._gigatoken: Any = None
        self._tokenizers = None if self._json is None else _tokenizers_from(self._json)
        self._sentencepiece: Any = None
        if self._model is not None:
            import sentencepiece

            spm.parse(self._model)  # our own message for a file that is not a model
            self._sentencepiece = sentencepiece.SentencePieceProcessor()
            try:
                self._sentencepiece.LoadFromSerializedProto(self._model)
            except Exception as error:  # it raises bare RuntimeErrors
                raise DataError(
                    f"{MODEL_FILE} must be a model that SentencePiece accepts; found: {error}. "
                    "Restore the file from a copy, or use another tokenizer"
                ) from error

    def _engine(self, name: str) -> Callable[[Sequence[str]], list[list[int]]]:
        if name == "sentencepiece":
            return lambda texts: self._sentencepiece.encode(list(texts))
        if name == "tokenizers":
            tokenizer = self._tokenizers
            assert tokenizer is not None
            return lambda texts: [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        return self._encode_gigatoken

    def _encode_gigatoken(self, texts: Sequence[str]) -> list[list[int]]:
        with self._lock:  # its objects are not made for two threads at once
            if self._gigatoken is None:
                import gigatoken

                data = _parts(self._json or "")  # special tokens stay entries, but are not searched for in a text
                data["added_tokens"] = [a for a in data["added_tokens"] if not a["special"]]
                text = json.dumps({**data, "post_processor": None}, ensure_ascii=False)
                self._gigatoken = gigatoken.Tokenizer.from_json(text)
            return self._gigatoken.encode_batch_list(list(texts))

    def _read_vocabulary(self) -> None:
        """Sizes, special ids, bytes of each id and the hash, from the tokenizer's own data."""
        if self._json is not None and self._tokenizers is not None:
            data, vocabulary = _parts(self._json), self._tokenizers.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values()) + 1
            self.bos_id = _special(vocabulary, self._settings.get("bos_token"), _BOS)
            self.eos_id = _special(vocabulary, self._settings.get("eos_token"), _EOS)
            special = {a["id"] for a in data["added_tokens"] if a["special"]}
            special |= {i for i in (self.bos_id, self.eos_id) if i is not None}
            unknown = vocabulary.get(data["model"].get("unk_token") or "", -1)
            self._silent = special - {unknown}
            added = {a["id"] for a in data["added_tokens"]}
            self._token_bytes = _byte_lengths(vocabulary, data, special | {unknown}, added)
            self.hash = _json_hash(data, vocabulary)
        else:
            model = spm.parse(self._model or b"")
            self.vocab_size = len(model.pieces)
            ids = self._sentencepiece.bos_id(), self._sentencepiece.eos_id()
            self.bos_id, self.eos_id = (i if i >= 0 else None for i in ids)
            self._silent = {i for i, p in enumerate(model.pieces) if p.type == spm.CONTROL}
            self._token_bytes = np.array([_piece_bytes(p) for p in model.pieces], dtype=np.int64)
            content = [[[p.text, p.score, p.type] for p in model.pieces], model.model_type]
            content.append([hashlib.sha256(v).hexdigest() for n, v in model.rest if n == 3])
            self.hash = _digest(content)


def _tokenizers_from(text: str) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{JSON_FILE} must be a tokenizer of the `tokenizers` library; found: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # special tokens in a text are text
    return tokenizer


def _parts(text: str) -> dict[str, Any]:
    """What a tokenizer.json says, with the parts it may leave out, and merges as pairs (`"a b"` in older files)."""
    data = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None, **json.loads(text)}
    if "merges" in data["model"]:
        data["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
    return data


def _special(vocabulary: dict[str, int], setting: Any, names: Sequence[str]) -> int | None:
    """Id of the special token that the settings name, else of the first usual name in the vocabulary."""
    if isinstance(setting, dict):
        setting = setting.get("content")
    found = [vocabulary[n] for n in ([setting] if setting else names) if n in vocabulary]
    return found[0] if found else None


def _byte_lengths(vocabulary: dict[str, int], data: dict[str, Any], special: set[int], added: set[int]) -> np.ndarray:
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    byte_level = '"ByteLevel"' in json.dumps([data["pre_tokenizer"], data["decoder"]])
    fallback = data["model"].get("byte_fallback", False)
    for piece, i in vocabulary.items():
        if i in special:
            continue
        if byte_level and i not in added:
            lengths[i] = len(piece)  # one character a byte
        else:
            is_byte = fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            lengths[i] = _piece_bytes(spm.Piece(piece, 0.0, spm.BYTE if is_byte else spm.NORMAL))
    return lengths


def _piece_bytes(piece: spm.Piece) -> int:
    if piece.type in (spm.CONTROL, spm.UNKNOWN):
        return 0
    return 1 if piece.type == spm.BYTE else len(piece.text.replace(spm.SPACE, " ").encode())


def _json_hash(data: dict[str, Any], vocabulary: dict[str, int]) -> str:
    """What decides the ids of a text: pieces, merges, normalizer, pre-tokenizer, tokens matched as a whole."""
    model = {k: v for k, v in data["model"].items() if k != "vocab"}
    whole = [[a["id"], a["content"], a["normalized"]] for a in data["added_tokens"] if not a["special"]]
    pieces = sorted((i, piece) for piece, i in vocabulary.items())
    return _digest([pieces, model, data["normalizer"], data["pre_tokenizer"], whole])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_difference(texts: Sequence[str], found: list[list[int]], wanted: list[list[int]]) -> str | None:
    for text, ours, theirs in zip(texts, found, wanted, strict=True):
        if list(ours) != list(theirs):
            return repr(text if len(text) <= 60 else text[:57] + "…")
    return None
