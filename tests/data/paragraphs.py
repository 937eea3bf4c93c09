"""Texts for preparation, from the standard library, and the size of the vocabulary that is trained on them."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB = 500
LIBRARY = Path(json.__file__).parent.parent
SOURCE = (LIBRARY / "argparse.py").read_text(encoding="utf-8")
PARAGRAPHS = [f"{i}: {p}" for i, p in enumerate((SOURCE * 2).split("\n\n")) if len(p) > 40]


def quiet(line: str) -> None:
    """Progress that nobody reads."""
