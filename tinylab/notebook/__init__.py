"""Notebooks without a browser: papermill with strict parameters, atomic output, signals and our exit codes.

`run_notebook` executes one, `collect_parameters` reads `-p k=v` and `-f file.yaml`, `write_result` is what a notebook's
last cell calls. Nothing here imports papermill before a notebook is really run.
"""

from __future__ import annotations

from typing import Any

from tinylab.notebook.parameters import Parameter, read_cell, read_yaml
from tinylab.notebook.results import result_path, write_result
from tinylab.notebook.run import collect_parameters, find_notebook, list_notebooks, notebook_parameters, run_notebook

__all__ = [
    "Parameter",
    "collect_parameters",
    "find_notebook",
    "list_notebooks",
    "notebook_parameters",
    "read_cell",
    "read_yaml",
    "result_path",
    "run_notebook",
    "write_result",
]


def __getattr__(name: str) -> Any:
    """`TinylabEngine` on demand: papermill imports this package while it is itself half imported."""
    if name == "TinylabEngine":
        from tinylab.notebook.engine import TinylabEngine

        return TinylabEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
