"""What notebooks call, and `tinylab run`, which executes them without a browser.

The names here are for cells; `tinylab.notebook.run` executes a notebook by papermill with strict parameters, atomic
output, signals and our exit codes. papermill itself is imported when a notebook is executed.
"""

from typing import Any

from tinylab.notebook.pretrain import continue_run, planned
from tinylab.notebook.results import result_path, write_result

__all__ = ["continue_run", "planned", "result_path", "write_result"]


def __getattr__(name: str) -> Any:
    """`TinylabEngine` on demand: papermill asks for its entry point while it loads."""
    if name == "TinylabEngine":
        import papermill  # noqa: F401  # first: engine.py needs it, and papermill needs engine.py while it loads

        from tinylab.notebook.engine import TinylabEngine

        return TinylabEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
