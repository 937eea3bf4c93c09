"""What a notebook found, as one JSON file beside its executed copy."""

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
    """Where the result of `notebook` goes: beside OUT as `….result.json`; in JupyterLab, into `runs/notebooks/`."""
    out = os.environ.get(OUT_VARIABLE)
    return Path(out).with_suffix(".result.json") if out else home() / "runs" / "notebooks" / f"{notebook}.result.json"


def write_result(notebook: str, **values: Any) -> Path:
    """Write the findings of `notebook` as JSON (NaN becomes null, numpy's scalars become numbers); returns the path."""
    path = result_path(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"notebook": notebook, **values}
    write_atomic(path, json.dumps(to_plain(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return path
