"""What a notebook found, as one JSON file beside its executed copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tinylab.runs.durable import write_atomic
from tinylab.runs.folder import home
from tinylab.runs.plain import to_plain

EXECUTOR_VARIABLE = "TINYLAB_EXECUTOR"
OUT_VARIABLE = "TINYLAB_NOTEBOOK_OUT"


def result_path(notebook: str) -> Path:
    """Where the result of `notebook` goes: OUT with `.result.json` for `.ipynb`; in JupyterLab `runs/notebooks/`.

    The name carries the notebook's, because the executed notebooks of one run share a folder.
    """
    out = os.environ.get(OUT_VARIABLE)
    return Path(out).with_suffix(".result.json") if out else home() / "runs" / "notebooks" / f"{notebook}.result.json"


def write_result(notebook: str, **values: Any) -> Path:
    """Write the findings of `notebook` as JSON (numpy scalars and NaN become plain numbers and null); its path."""
    path = result_path(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"notebook": notebook, **values}
    write_atomic(path, json.dumps(to_plain(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return path
