"""Notebooks without a browser: papermill with strict parameters, atomic output, signals and our exit codes.

`run_notebook` executes one, `collect_parameters` reads values as the command line gives them, `continue_run` is
notebook 02, `write_result` is what a last cell calls. Nothing here imports papermill before a notebook is really run.
"""

from __future__ import annotations

from typing import Any

from tinylab.notebook.parameters import Parameter, read_cell, read_yaml
from tinylab.notebook.pretrain import continue_run, planned
from tinylab.notebook.results import result_path, write_result
from tinylab.notebook.run import collect_parameters, find_notebook, list_notebooks, notebook_parameters, run_notebook

__all__ = [
    "Parameter",
    "collect_parameters",
    "continue_run",
    "find_notebook",
    "list_notebooks",
    "notebook_parameters",
    "planned",
    "read_cell",
    "read_yaml",
    "result_path",
    "run_notebook",
    "write_result",
]


def __getattr__(name: str) -> Any:
    """`TinylabEngine` and `AtomicHandler` on demand: papermill asks for its entry point while it loads."""
    if name in ("TinylabEngine", "AtomicHandler"):
        import papermill  # first, whoever asks first: engine.py needs it, and it needs engine.py

        assert papermill
        from tinylab.notebook import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
