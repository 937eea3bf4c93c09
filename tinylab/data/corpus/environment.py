"""The `local` corpus: the text of the running Python environment, read and never imported.

Prose: package descriptions, documentation files and docstrings. Code: sources of the standard library and of the
installed packages. Files come in the order of a hash of their names, so that the first megabytes are a sample of
the whole environment; a file is read only when its documents are requested. tinylab itself and
test folders are left out.
"""

import ast
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinylab.data.corpus.document import Document

PROSE_SUFFIXES = (".md", ".rst", ".txt")
MIN_PROSE = 120
"""Characters below which a docstring or document is too short to learn from."""
MIN_CODE = 64
MAX_FILE_BYTES = 200_000
"""Larger sources are tables or generated, and one of them would fill a small sample."""
MIN_DOCSTRING_SHARE = 0.1
"""Sources with a smaller share of triple-quoted text are not parsed for docstrings.

On 1,500 files of 200 packages the others held 96% of the docstrings and took two thirds of the time.
"""
MIN_WORD_SHARE = 0.7
"""Letters and spaces among a text file's characters; data tables and word lists of symbols have fewer."""

_SKIPPED_FOLDERS = {
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "licenses",
    "site-packages",
    "dist-packages",
    "tinylab",
}
_SKIPPED_FILES = re.compile(
    r"(__editable__|_sysconfigdata|licen[cs]e|copying|copyright|notice|authors|contributors|third.?party"
    r"|requirements|top_level|entry_points|vocab|cmakelists)",
    re.IGNORECASE,
)
_TRIPLE = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Unit:
    """A file, or a package's description, that documents are drawn from."""

    origin: str
    path: str
    description: str | None = None


def prose(skipped: Counter[str]) -> Iterator[Document]:
    """Descriptions, documentation files and docstrings; `skipped` counts what is left out, by reason."""
    units = _files((*PROSE_SUFFIXES, ".py"))
    for unit in _descriptions(skipped):
        units.setdefault(unit.origin, unit)
    for unit in _spread(units):
        if unit.description is not None:
            documents = [(unit.description, unit.origin)]
        elif unit.origin.endswith(".py"):
            documents = _docstrings(unit, skipped)
        else:
            text = _read(unit, skipped)
            words = sum(c.isalpha() or c == " " for c in text)
            if words < MIN_WORD_SHARE * len(text):
                skipped["text files that are no prose"] += 1
                continue
            documents = [(text, unit.origin)]
        for text, origin in documents:
            if _usable(text, MIN_PROSE, skipped):
                yield Document(text, origin)


def code(skipped: Counter[str]) -> Iterator[Document]:
    """The sources of the standard library and installed packages; `skipped` as in `prose`."""
    for unit in _spread(_files((".py",))):
        text = _read(unit, skipped)
        if _usable(text, MIN_CODE, skipped):
            yield Document(text, unit.origin)


def _roots() -> list[tuple[str, Path]]:
    """Folders of the standard library and of installed packages, with the label of their origins."""
    library = [("stdlib", sysconfig.get_path("stdlib"))]
    packages = [("package", p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    roots: dict[Path, str] = {}
    for label, folder in [*library, *packages]:
        path = Path(folder)
        if path.is_dir():
            roots.setdefault(path.resolve(), label)
    return [(label, path) for path, label in roots.items()]


def _files(suffixes: tuple[str, ...]) -> dict[str, _Unit]:
    """Files of the environment by origin (`stdlib:json/decoder.py`); of two of one name the imported one."""
    units: dict[str, _Unit] = {}
    for label, root in _roots():
        for folder, folders, names in os.walk(root):
            folders[:] = [
                f for f in folders if f not in _SKIPPED_FOLDERS and not f.endswith((".dist-info", ".egg-info"))
            ]
            inside = Path(folder).relative_to(root).as_posix().removeprefix(".")
            for name in names:
                if name.endswith(suffixes) and not _SKIPPED_FILES.match(name):
                    origin = f"{label}:{inside}/{name}" if inside else f"{label}:{name}"
                    units.setdefault(origin, _Unit(origin, os.path.join(folder, name)))
    return units


def _spread(units: dict[str, _Unit]) -> list[_Unit]:
    """The units in the order of a hash of their origins: the same on every file system, and every prefix a sample."""
    return sorted(units.values(), key=lambda u: hashlib.blake2b(os.fsencode(u.origin), digest_size=16).digest())


def _read(unit: _Unit, skipped: Counter[str]) -> str:
    """A file's text unchanged; empty, and counted, when it cannot be used."""
    try:
        with open(unit.path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) <= MAX_FILE_BYTES:
            return data.decode("utf-8-sig")
        skipped[f"files over {MAX_FILE_BYTES:,} bytes"] += 1
    except OSError:
        skipped["files that cannot be read"] += 1
    except UnicodeDecodeError:
        skipped["files that are not UTF-8"] += 1
    return ""


def _descriptions(skipped: Counter[str]) -> Iterator[_Unit]:
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        except UnicodeDecodeError:
            skipped["files that are not UTF-8"] += 1
            continue
        text = text.replace("\r\n", "\n")
        header, _, body = text.partition("\n\n")
        name = re.search(r"^Name: *(\S+)", header, re.MULTILINE)
        if name and name[1].lower() != "tinylab":
            yield _Unit(f"package:{name[1]}/METADATA", "", body.strip())


def _docstrings(unit: _Unit, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """(docstring, dotted name) of a module, its classes and their methods, its functions."""
    text = _read(unit, skipped)
    if sum(len(a) + len(b) for a, b in _TRIPLE.findall(text)) <= MIN_DOCSTRING_SHARE * len(text):
        return
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is all live objects: collecting while it grows takes a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        skipped["sources that cannot be parsed"] += 1
        return
    finally:
        if collecting:
            gc.enable()
    name = unit.origin.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield _docstring(tree), name
    yield from _members(tree.body, name)


def _members(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, _NAMED):
            name = f"{prefix}.{node.name}"
            yield _docstring(node), name
            if isinstance(node, ast.ClassDef):
                yield from _members(node.body, name)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _members(node.body, prefix)
            yield from _members(node.orelse, prefix)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(text) if text else ""


def _usable(text: str, shortest: int, skipped: Counter[str]) -> bool:
    """Whether a text is long enough and names no folder of this environment or user; counts why not."""
    if 0 < len(text) < shortest:
        skipped["texts too short"] += 1
    elif any(folder in text for folder in _machine_folders()):
        skipped["texts that name a folder of this machine"] += 1
    else:
        return bool(text)
    return False


@functools.cache
def _machine_folders() -> tuple[str, ...]:
    """Folders of the environment and of the user; short system folders such as /usr do not count."""
    folders = {sys.prefix, sys.base_prefix, os.path.expanduser("~")}
    return tuple(sorted(f for f in folders if len(Path(f).parts) > 2))
