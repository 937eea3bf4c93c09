"""Tokens and passwords, taken out of whatever is written down: command lines, notebooks, logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "***"
_NAME = re.compile(r"TOKEN(?!S|IZ)|SECRET|PASSWORD|PASSWD|API[_-]?KEY|ACCESS[_-]?KEY|CREDENTIAL|AUTH$", re.IGNORECASE)
"""Names of environment variables and options whose values are secret."""
_TEXT = re.compile(
    r"\b(?:hf_|gh[pousr]_|sk-|AKIA|xox[abprs]-)[A-Za-z0-9_-]{12,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)",
)
"""Tokens by their known forms, and name and password in a URL."""


def remove_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with `***` for every token of a known form, every password in a URL, and every value (of eight or more
    characters) of an environment variable whose name speaks of a secret; `environment` is this process's by default.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if _NAME.search(name) and len(value) >= 8 and not os.path.exists(value):
            text = text.replace(value, HIDDEN)
    return _TEXT.sub(HIDDEN, text)


def redact(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets: those that `remove_secrets` finds, and the values of options named for one."""
    result, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.rpartition("=")
        if hide:
            argument = HIDDEN
        elif equals and _NAME.search(name):
            argument = f"{name}={HIDDEN}"
        hide = not hide and not equals and argument.startswith("-") and bool(_NAME.search(argument))
        result.append(remove_secrets(argument))
    return result
