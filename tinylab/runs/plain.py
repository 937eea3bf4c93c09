"""Any result as plain JSON values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, text, finite numbers, true, false and null that say the same as `value`.

    Takes mappings, sequences, dataclasses, paths, pandas tables (one object per row), numpy and torch scalars and
    arrays. Numbers that JSON lacks (nan, inf) become null; anything unknown becomes its text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "columns") and callable(to_dict := getattr(value, "to_dict", None)):
        return to_plain(to_dict(orient="records"))
    if callable(to_list := getattr(value, "tolist", None)):
        return to_plain(to_list())
    if isinstance(value, Iterable):
        return [to_plain(v) for v in value]
    return str(value)
