"""The `hf` corpus: a data set on the Hugging Face Hub or in a local folder, streamed; none of its code is run."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylab.data.corpus.document import NO_TEXT, Document, require_text_column
from tinylab.errors import DataError


def open_huggingface(name: str, skipped: Counter[str]) -> Iterator[Document]:
    """Rows of the `train` split of `NAME[:CONFIG]`. Raises DataError when it cannot be reached or has no text."""
    import datasets

    spec = f"hf:{name}".removesuffix(":")
    name, _, config = name.partition(":")
    name = os.path.expanduser(name)
    try:
        if (Path(name) / "state.json").exists():
            rows: Any = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        columns = list(rows.features or next(iter(rows), {}))
    except Exception as error:  # the library raises many kinds: not found, offline, gated, malformed
        raise _unavailable(spec, name, error) from error
    column = require_text_column(spec, columns)

    def documents() -> Iterator[Document]:
        numbered = enumerate(iter(rows))
        while True:
            try:
                number, row = next(numbered)
            except StopIteration:
                return
            except Exception as error:
                raise _unavailable(spec, name, error) from error
            if isinstance(row[column], str):
                yield Document(row[column], f"{spec}:train:{number}")
            else:
                skipped[NO_TEXT] += 1

    return documents()


def _unavailable(spec: str, name: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return DataError(f"{spec} must be a data set folder with a `train` split; found: {reason}")
    return DataError(
        f"{spec} must be a data set that can be reached; found: {reason}. Check the name, the network and the login "
        "(hf auth login), or point data.sources.corpus at local files (files:GLOB) or a folder (hf:FOLDER)"
    )
