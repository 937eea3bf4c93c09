"""The training loop. The folder itself can be called: `tinylab.train(config, run)` is `loop.train`."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that bears the name of its main function."""

    @property
    def __signature__(self) -> inspect.Signature:
        """What Shift+Tab and help show: the parameters of that function."""
        from tinylab.train.loop import train

        return inspect.signature(train)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tinylab.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
