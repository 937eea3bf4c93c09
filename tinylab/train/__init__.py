"""The training loop. The folder itself can be called: `tinylab.train(config, run)` is `loop.train`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that bears the name of its main function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tinylab.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
