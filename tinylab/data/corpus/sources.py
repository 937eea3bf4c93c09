"""The kinds of corpora by the beginning of their names: where a new source of documents is entered.

A corpus is an iterator of documents in an order that depends on names alone, never on how a folder is listed.
It reads lazily: a consumer that stops early causes nothing further to be opened.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from tinylab.data.corpus import environment
from tinylab.data.corpus.document import Document
from tinylab.data.corpus.files import open_files
from tinylab.data.corpus.huggingface import open_huggingface
from tinylab.errors import DataError

KINDS: dict[str, Callable[[str, Counter[str]], Iterator[Document]]] = {
    "local:prose": lambda _, skipped: environment.prose(skipped),
    "local:code": lambda _, skipped: environment.code(skipped),
    "files:": open_files,
    "hf:": open_huggingface,
}
"""What opens a corpus, given what follows the beginning of its name and the counter of `open_corpus`."""


def open_corpus(spec: str, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """The documents of `local:prose`, `local:code`, `files:GLOB` or `hf:NAME[:CONFIG]`.

    `skipped` counts what was left out, by reason: unreadable files of the environment, rows without text.
    GLOB is recursive (`**`) and may list alternatives (`docs/**/*.{md,txt}`); files.py has the formats.
    Raises DataError when the corpus does not exist, and while iterating when a file given by name is damaged.
    """
    for kind, opener in KINDS.items():
        rest = spec.removeprefix(kind)
        if spec.startswith(kind) and bool(rest) == kind.endswith(":"):
            return opener(rest, Counter() if skipped is None else skipped)
    raise DataError(
        f"a corpus must be local:prose, local:code, files:GLOB or hf:NAME[:CONFIG]; found {spec!r}. "
        "Change data.sources.corpus"
    )
