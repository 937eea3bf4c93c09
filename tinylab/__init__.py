"""tinylab: pretrain small language models and understand what happened.

Importing this package loads nothing heavy: every name below is fetched from its module at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tinylab import plots as plots
    from tinylab import widgets as widgets
    from tinylab.catalog.reference import load_model as load_model
    from tinylab.catalog.reference import load_tokenizer as load_tokenizer
    from tinylab.config import presets as presets
    from tinylab.data.prepare import prepare as prepare
    from tinylab.dist.handle import attach as attach
    from tinylab.dist.launch import launch as launch
    from tinylab.evaluation.compare import compare as compare
    from tinylab.evaluation.evaluate import evaluate as evaluate
    from tinylab.evaluation.published import published as published
    from tinylab.evaluation.scores import Scores as Scores
    from tinylab.model.generate import generate as generate
    from tinylab.planner import plan as plan
    from tinylab.runs.folder import Run as Run
    from tinylab.training.loop import train as train

_NAMES = {
    "Run": "tinylab.runs.folder:Run",
    "Scores": "tinylab.evaluation.scores:Scores",
    "attach": "tinylab.dist.handle:attach",
    "compare": "tinylab.evaluation.compare:compare",
    "evaluate": "tinylab.evaluation.evaluate:evaluate",
    "generate": "tinylab.model.generate:generate",
    "launch": "tinylab.dist.launch:launch",
    "load_model": "tinylab.catalog.reference:load_model",
    "load_tokenizer": "tinylab.catalog.reference:load_tokenizer",
    "plan": "tinylab.planner:plan",
    "plots": "tinylab.plots",
    "prepare": "tinylab.data.prepare:prepare",
    "presets": "tinylab.config.presets",
    "published": "tinylab.evaluation.published:published",
    "train": "tinylab.training.loop:train",
    "widgets": "tinylab.widgets",
}
"""Public name to `module` or `module:attribute`."""


if not TYPE_CHECKING:  # a type checker would take every name for a public one

    def __getattr__(name: str) -> Any:
        """The public object called `name`, imported now. Raises AttributeError for any other name."""
        if name not in _NAMES:
            raise AttributeError(f"module 'tinylab' has no attribute {name!r}")
        module, _, attribute = _NAMES[name].partition(":")
        value = importlib.import_module(module)
        if attribute:
            value = getattr(value, attribute)
            globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted([*_NAMES, "__version__"])
