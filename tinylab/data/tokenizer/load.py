"""Tokenizers: train one, load one; see encode.py for what they do.

Every load is compared with SentencePiece where there is a `tokenizer.model`, because look-alikes are silent:
transformers' conversion of Llama's file decodes to the right text and has other ids on most source files.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinylab.data.tokenizer import sentencepiece_model as spm
from tinylab.data.tokenizer.adversarial import SAMPLE
from tinylab.data.tokenizer.encode import CONFIG_FILE, JSON_FILE, MODEL_FILE, Tokenizer
from tinylab.errors import DataError

MAX_BYTES = 200_000_000
"""Of a tokenizer's file: far above the largest published ones."""
MAX_GROWTH = 1000
"""How many times longer a tokenizer's replacements may make a text, taken together."""
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A Llama-style BPE of exactly `vocab_size` entries trained on `texts` (see sentencepiece_model.train)."""
    model = spm.train(texts, vocab_size)
    return _with_model(spm.serialize(model), None, {})


def load_tokenizer_file(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.model, tokenizer.json) or file, compared with SentencePiece if it can be.

    Where there is a tokenizer.model it is the reference: a tokenizer.json with other ids is replaced by one rebuilt
    from the model, and if that differs too, SentencePiece itself encodes; `notes` says so.
    Raises DataError when there is nothing to load or it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"a tokenizer must be a folder or file that exists; found nothing at {path}")
    folder = path if path.is_dir() else path.parent
    beside = path.is_dir() or path.name in (JSON_FILE, MODEL_FILE)
    json_file = path if path.suffix == ".json" else folder / JSON_FILE
    model_file = path if path.suffix == ".model" else folder / MODEL_FILE
    json_text = _read(json_file) if json_file == path or (beside and json_file.exists()) else None
    model = _read(model_file) if model_file == path or (beside and model_file.exists()) else None
    if json_text is None and model is None:
        raise DataError(f"{path} must be or hold {JSON_FILE} or {MODEL_FILE}; found neither")
    settings: dict[str, Any] = {}
    if beside and (folder / CONFIG_FILE).exists():
        settings = _parse_json(folder / CONFIG_FILE, _read(folder / CONFIG_FILE))
    if json_text is not None:
        parts = _parse_json(json_file, json_text)
        growth = max(_growth(parts.get(part)) for part in ("normalizer", "decoder"))
        if growth > MAX_GROWTH:
            raise DataError(
                f"the replacements of {json_file} must not make a text more than {MAX_GROWTH} times longer; they may "
                f"make it {growth:.3g} times longer. Use the tokenizer's own file"
            )
    try:
        text = None if json_text is None else json_text.decode()
        if model is not None:
            return _with_model(model, text, settings)
        return Tokenizer(json_text=text, settings=settings).check(SAMPLE).accelerate()
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # the libraries raise many kinds for a file that only looks like a tokenizer
        raise DataError(
            f"{path} must hold a tokenizer that encodes text; found: {error!r}. "
            "Restore its files from a copy, or use another tokenizer"
        ) from error


def fetch_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: a folder or file, else a Hub id with optional revision (`owner/name@revision`).

    Raises DataError when it is neither, or the Hub cannot be reached and the cache has no copy.
    """
    match = _HUB_ID.fullmatch(name)
    if Path(name).expanduser().exists() or not match:
        return load_tokenizer_file(name)
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            match[1], revision=match[2], allow_patterns=[JSON_FILE, MODEL_FILE, CONFIG_FILE]
        )
    except Exception as error:  # not found, offline, gated, no connection: many kinds without a common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"tokenizer {name} must be a local folder or file, or a Hub id that can be reached; found: {reason}. "
            'Check the name, network and login (hf auth login), or set data.tokenizer to a local copy or to "train"'
        ) from error
    return load_tokenizer_file(folder)


def _with_model(model: bytes, json_text: str | None, settings: dict[str, Any]) -> Tokenizer:
    """The first of tokenizer.json, the rebuilt one and SentencePiece itself that encodes to SentencePiece's ids."""
    notes: list[str] = []
    plain = Tokenizer(model=model, settings=settings)
    parsed = spm.parse(model)
    reason = parsed.why_not_rebuilt()
    candidates: list[tuple[str, Callable[[], str]]] = []
    if json_text is not None:
        candidates.append((JSON_FILE, lambda: json_text))
    if reason is None:
        candidates.append(("the tokenizer rebuilt from tokenizer.model", lambda: spm.rebuild(parsed).to_str()))
    else:
        notes.append(f"tokenizer.model is encoded by SentencePiece itself: {reason}")
    for name, make in candidates:
        tokenizer = Tokenizer(json_text=make(), model=model, settings=settings).check(SAMPLE)
        if tokenizer.backend == "tokenizers":
            tokenizer.notes = notes
            return tokenizer.accelerate()
        notes += [f"{name}: {note.partition('; using')[0]}" for note in tokenizer.notes]
    plain.notes = [*notes, "using sentencepiece"] if candidates else notes
    return plain


def _read(path: Path) -> bytes:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} must be a file of at most {MAX_BYTES:,} bytes. Use the tokenizer's own file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} must be readable; found: {error.strerror}. Check its permissions") from error


def _growth(part: Any) -> float:
    """How many times longer the Replace steps in a part of tokenizer.json may make a text, one after another."""
    if not isinstance(part, dict):
        return 1.0
    steps = part.get("normalizers") or part.get("decoders")
    growth = math.prod(map(_growth, steps)) if isinstance(steps, list) else 1.0
    if part.get("type") == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        growth *= max(1.0, len(str(content)) / (len(text) if isinstance(text, str) and text else 1))
    return growth


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must be JSON; found: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must be a JSON object; found {type(value).__name__}")
    return value
