"""Settings of the Jupyter server in tinylab's environment; `make setup` copies them to .venv/etc/jupyter."""

from __future__ import annotations

import os
import subprocess
from typing import Any

IF_UNCHANGED_REFRESH = 'git ls-files --error-unmatch -- "$1" && git diff --quiet -- "$1" && git add -- "$1"'


def note_unchanged_notebook(model: dict[str, Any], os_path: str, **_: Any) -> None:
    """After a save: tell git that a tracked notebook is unchanged where only its outputs differ.

    The clean filter hides outputs from `git diff`, but `git status` goes by the file's size until the index is updated.
    """
    folder, name = os.path.split(os_path)
    if model["type"] == "notebook":
        subprocess.run(["sh", "-c", IF_UNCHANGED_REFRESH, "sh", name], cwd=folder, capture_output=True)


get_config().FileContentsManager.post_save_hook = note_unchanged_notebook  # type: ignore[name-defined]  # noqa: F821
