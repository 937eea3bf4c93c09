"""Notebooks as git keeps them: without outputs, counters and what a frontend adds. Any Python 3, no packages.

As the clean filter of git (set up by `make setup`) it reads one notebook from standard input and writes it to standard
output; given files, as pre-commit does, it rewrites those that need it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

METADATA = {
    "kernelspec": {"display_name": "tinylab", "language": "python", "name": "tinylab"},
    "language_info": {"name": "python"},
}


def strip(text: str) -> str:
    """The notebook `text` as it is committed; text that is no notebook comes back unchanged."""
    try:
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tags" and value}
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
    except (ValueError, KeyError, TypeError, AttributeError):
        return text
    return json.dumps(notebook | {"metadata": METADATA}, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def main(paths: list[str]) -> None:
    """Filter standard input, or rewrite the files at `paths`."""
    if not paths:
        text = sys.stdin.buffer.read().decode("utf-8")
        sys.stdout.buffer.write(strip(text).encode("utf-8"))
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        if strip(text) != text:
            path.write_text(strip(text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
