"""HTML is written in tinylab/html/ alone, where everything is escaped. Read from the strings of the syntax tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "tinylab"
TAGS = (
    *("a", "b", "body", "br", "button", "caption", "code", "div", "em", "figcaption", "figure", "h[1-6]", "head", "hr"),
    *("html", "i", "iframe", "img", "input", "li", "link", "meta", "nav", "ol", "p", "pre", "script", "section"),
    *("select", "small", "span", "strong", "style", "sub", "sup", "svg", "table", "tbody", "td", "th", "thead"),
    *("title", "tr", "u", "ul", "!doctype"),
)
MARKUP = re.compile(rf"</?({'|'.join(TAGS)})(\s|/|>)|</$|&(nbsp|lt|gt|amp|quot|#\d+);", re.IGNORECASE)


def written(path: Path) -> list[str]:
    """`file:line: text` of every string with HTML in it; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [
        f"{path.name}:{node.lineno}: {node.value[:60]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        if MARKUP.search(node.value)
    ]


def test_no_other_module_writes_html():
    others = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "html"]
    assert len(others) > 50 and [line for path in others for line in written(path)] == []


def test_every_module_of_html_is_seen_to_write_it():
    modules = [path for path in (PACKAGE / "html").glob("*.py") if path.stem not in ("__init__", "escape")]
    assert modules and all(written(path) for path in modules)


@pytest.mark.parametrize(
    "text",
    [
        "x = '<div>'",
        "x = '<table class=\"a\">'",
        "x = f'<span style=\"color:{x}\">'",
        "x = f'<{x}>' + '</'",
        "def f():\n    '''A docstring.'''\n    return '<h3>' + f() + '</h3>'",
        "x = '&nbsp;'",
        "x = ['<style>', '']",
    ],
)
def test_planted_html_is_seen(tmp_path: Path, text: str):
    module = tmp_path / "seeded.py"
    module.write_text(text)
    assert len(written(module)) >= 1


@pytest.mark.parametrize(
    "text", ["x = '</s> and <s>'", "x = struct.pack('<i', 1)", "x = 'a < b and <|endoftext|>'", '"""A `<div>`."""']
)
def test_other_text_with_angles_is_not_html(tmp_path: Path, text: str):
    module = tmp_path / "innocent.py"
    module.write_text(text)
    assert written(module) == []
