"""Which files hold the weights of a Hugging Face folder: the single one, or those that its weight map names."""

import json
import re
from pathlib import Path

from tinylab.errors import CheckpointError

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = SAFETENSORS + ".index.json"
MAX_INDEX_BYTES = 10_000_000


def has_weights(folder: Path, single: str) -> bool:
    """Whether the folder has `single` (SAFETENSORS or PICKLED) or the weight map of its parts."""
    return (folder / single).is_file() or (folder / f"{single}.index.json").is_file()


def weight_files(folder: Path, single: str = SAFETENSORS) -> list[str]:
    """Names of the files of `single`'s kind: those of the weight map `single`.index.json, or else `single` alone.

    Raises CheckpointError for a weight map that is unreadable, names files outside the folder, or missing ones.
    """
    index = folder / f"{single}.index.json"
    if not index.exists():
        if (folder / single).is_file():
            return [single]
        raise CheckpointError(f"{folder} must hold {index.name} or {single}; neither was found")
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{index} must be at most {MAX_INDEX_BYTES} bytes; found {index.stat().st_size}")
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} must be a JSON object with a weight_map of file names: {error}") from error
    suffix = Path(single).suffix
    bad = [f for f in files if not isinstance(f, str) or not re.fullmatch(r"[\w-][\w.-]*" + re.escape(suffix), f)]
    if bad or not files:
        found = ", ".join(repr(f)[:100] for f in bad) or "no file"
        raise CheckpointError(f"{index} must name {suffix} files of its own folder; found {found}")
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names files that are missing: {', '.join(missing)}. Copy or download them again"
        )
    return files
