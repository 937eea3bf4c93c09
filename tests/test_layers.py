"""Imports go one way. Read from the syntax tree, so that imports inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tinylab"
LAYERS = (
    ("errors",),
    ("config", "runs"),
    ("model", "data", "optim"),
    ("dist", "formats"),
    ("checkpoint", "catalog"),
    ("training", "evaluation", "analysis", "planner", "doctor"),
    ("html", "plots", "widgets", "notebook", "report", "bench", "demo"),
    ("cli",),
    ("__main__",),
)
"""The line of the design; within a layer, too, a module imports only from its left."""
ORDER = {name: i for i, name in enumerate(name for layer in LAYERS for name in layer)}
NO_TORCH = ("errors", "config", "runs", "planner", "model/accounting", "data/order")
THIRD_PARTY_BASES = {"config", "runs", "errors"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `from tinylab import plots` gives tinylab.plots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append((node.lineno, "." * node.level + (node.module or "")))
            elif node.module == "tinylab":
                found += [(node.lineno, f"tinylab.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found


def violations(path: Path) -> list[str]:
    own = layer_of(path)
    problems = []
    for line, name in imported(path):
        if name.startswith("."):
            problems.append(f"{path}:{line}: relative import {name}")
        if not name.startswith("tinylab."):
            continue
        other = name.split(".")[1]
        if other in ORDER and other != own and ORDER[other] > ORDER[own]:
            problems.append(f"{path}:{line}: {own} must not import {other}, which stands to its right")
    return problems


def test_every_module_belongs_to_a_layer():
    assert sorted({layer_of(p) for p in modules()} - set(ORDER)) == []


def test_imports_go_one_way():
    assert [problem for path in modules() for problem in violations(path)] == []


@pytest.mark.parametrize(
    "text",
    [
        "from tinylab.cli import main",
        "def f():\n    import tinylab.training.loop",
        "from tinylab import widgets",
        "from .. import x",
    ],
)
def test_an_import_to_the_right_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    module = tmp_path / "model" / "seeded.py"
    module.parent.mkdir()
    module.write_text(text)
    assert len(violations(module)) == 1


def module_name(path: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(("tinylab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports_from(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from tinylab… import name`, wherever it stands."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    return [(n.module or "", alias.name) for n in nodes if (n.module or "").startswith("tinylab") for alias in n.names]


def circle(paths: list[Path]) -> list[str]:
    """Modules that import one another in a circle; empty if there are none. `__init__` files list names and are left
    out."""
    known = {module_name(p): p for p in paths if p.name != "__init__.py"}
    graph = {
        name: {
            found
            for module, imported_name in imports_from(path)
            for found in (f"{module}.{imported_name}", module)
            if found in known and found != name
        }
        for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def defined_names(path: Path) -> set[str]:
    """Names that a module defines itself at its top level, in branches too."""
    found: set[str] = set()
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            nodes += [*node.body, *node.orelse, *getattr(node, "handlers", [])]
        elif isinstance(node, ast.ExceptHandler):
            nodes += node.body
    return found


def second_addresses(paths: list[Path]) -> list[str]:
    """Imports of a name from a module that does not define it, as `importer: module.name`."""
    known = {module_name(p): p for p in paths}
    return [
        f"{module_name(path)}: {module}.{name}"
        for path in paths
        if path.name != "__init__.py"
        for module, name in imports_from(path)
        if module in known and f"{module}.{name}" not in known and name not in defined_names(known[module])
    ]


def test_no_modules_import_one_another_in_a_circle():
    assert circle(modules()) == []


def test_a_name_has_one_address():
    assert second_addresses(modules()) == []


@pytest.mark.parametrize(
    "back",
    [
        "from tinylab.model.one import first",
        "from tinylab.model import one",
        "def f():\n    from tinylab.model.one import first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tinylab.model.one import first",
    ],
)
def test_a_circle_inside_a_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "one.py").write_text("from tinylab.model.two import second\nfirst = 1\n")
    (tmp_path / "model" / "two.py").write_text(f"{back}\nsecond = 2\n")
    assert set(circle(modules())) == {"tinylab.model.one", "tinylab.model.two"}


def test_a_re_export_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "home.py").write_text("THERE = 1\n")
    (tmp_path / "other.py").write_text("from tinylab.home import THERE\n")
    (tmp_path / "user.py").write_text("from tinylab.other import THERE\n")
    assert second_addresses(modules()) == ["tinylab.user: tinylab.other.THERE"]


def test_configuration_and_run_folders_need_the_standard_library_only():
    import sys

    for path in modules():
        if layer_of(path) in THIRD_PARTY_BASES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                foreign = [n for n in names if n.split(".")[0] not in (*sys.stdlib_module_names, "tinylab")]
                assert foreign == [], f"{path}:{node.lineno}"


def test_planning_and_data_order_import_no_torch():
    for path in modules():
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name.startswith(NO_TORCH):
            assert [n for _, n in imported(path) if n.split(".")[0] == "torch"] == [], path


def test_nobody_changes_the_search_path():
    changes = re.compile(r"sys\.path(\.(append|insert|extend)\b|\s*\+?=[^=])")
    assert [p for p in modules() if changes.search(p.read_text(encoding="utf-8"))] == []


def code_lines(path: Path) -> int:
    """Lines that are neither empty nor part of a docstring (a field's documentation is not length)."""
    text = path.read_text(encoding="utf-8")
    strings = [
        n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    documented = sum((s.end_lineno or s.lineno) - s.lineno + 1 for s in strings)
    return sum(1 for line in text.splitlines() if line.strip()) - documented


def test_no_module_is_called_utils_and_none_is_much_over_300_lines():
    assert [p for p in modules() if p.stem in ("utils", "util", "helpers", "common", "misc")] == []
    assert {str(p): n for p in modules() if (n := code_lines(p)) > 320} == {}
