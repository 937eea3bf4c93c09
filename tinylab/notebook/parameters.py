"""The parameters of a notebook: read from its tagged cell by syntax, filled strictly, from text or from YAML.

papermill alone injects unknown names with a warning, and its YAML turns `4e-4` into text and `no` into false.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import math
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylab.config.counts import parse_count
from tinylab.errors import ConfigError, did_you_mean

MAX_YAML_BYTES = 1_000_000
MAX_DEPTH = 50
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
_WORDS = {
    "int": "a whole number such as 200000 or 200K",
    "float": "a finite number",
    "str": "text",
    "bool": "true or false",
    "dict": "a mapping with text keys",
    "list": "a list",
}


@dataclass(frozen=True)
class Parameter:
    """One line of the tagged cell: `name: annotation = default  # comment`."""

    name: str
    annotation: str
    """`int`, `float`, `str`, `bool`, `dict`, `list`, `list[str]` and the like, or `Optional[…]` of one of them."""
    default: Any
    comment: str = ""

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return self.annotation.startswith("Optional[")

    @property
    def base(self) -> str:
        """The annotation without `Optional[…]`."""
        return self.annotation[len("Optional[") : -1] if self.optional else self.annotation

    def accept(self, value: Any) -> Any:
        """`value` as this parameter's type (whole floats become int, ints float). Raises ConfigError otherwise."""
        if value is None and self.optional:
            return None
        try:
            return _as_type(self.base, value, 0)
        except (ValueError, OverflowError):
            raise ConfigError(f"parameter {self.name} must be {self._wanted()}; found {_short(value)}") from None

    def parse(self, text: str) -> Any:
        """The value written as `text` on a command line; counts may end in K, M, B or T, lists are JSON or a,b,c."""
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        try:
            return self.accept(_from_text(self.base, text))
        except (ValueError, OverflowError, ConfigError):
            raise ConfigError(f"parameter {self.name} must be {self._wanted()}; found {text!r}") from None

    def _wanted(self) -> str:
        kind, _, inner = self.base.rstrip("]").partition("[")
        wanted = _WORDS[kind] + (f" of {inner}" if inner else "")
        return wanted + (", or none" if self.optional else "")


def read_cell(source: str, where: str = "parameters cell") -> dict[str, Parameter]:
    """The parameters that a cell's source declares, in order.

    Raises ConfigError, naming line and rule, unless each statement is one `name: type = literal` on its own line.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: must be Python; found {error.msg}") from error
    comments = _comments(source)
    found: dict[str, Parameter] = {}
    for node in statements:
        at = f"{where}, line {node.lineno}"
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ConfigError(f"{at}: must be `name: type = literal`; found {ast.unparse(node)[:80]!r}")
        name, annotation = node.target.id, ast.unparse(node.annotation)
        if not _is_name(name) or name in found:
            raise ConfigError(f"{at}: needs a plain name, once; found {name!r}")
        if not _is_known_type(annotation):
            raise ConfigError(f"{at}: type must be one of {', '.join(_WORDS)}, list[…] or Optional[…]; {annotation!r}")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ConfigError(f"{at}: the default must be a literal; found {ast.unparse(node.value)!r}") from None
        found[name] = Parameter(name, annotation, default, comments.get(node.end_lineno or node.lineno, ""))
        found[name].accept(default)
    return found


def check_values(declared: dict[str, Parameter], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` in their declared types. Raises one ConfigError with each unknown name and bad value."""
    problems, result = [], {}
    for name, value in values.items():
        if name not in declared:
            problems.append(unknown_parameter(declared, name))
            continue
        try:
            result[name] = declared[name].accept(value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    return result


def unknown_parameter(declared: dict[str, Parameter], name: str) -> str:
    """The message for a name that the notebook does not declare."""
    hint = did_you_mean(name, declared, f"known: {', '.join(declared) or 'none'}")
    return f"unknown parameter {str(name)!r}; {hint}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A parameter file as a dictionary. `4e-4` is a number, `no` and `12:30` are text.

    Raises ConfigError with file and line for duplicate keys, aliases, tags, nesting over 50 levels, files over 1 MB.
    """
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path} must be at most {MAX_YAML_BYTES} bytes; found {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the parameter file {path}: {error}") from error
    try:
        _check_depth(yaml, text, path)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    value = {} if root is None else _plain_node(yaml, root, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold `name: value` lines; found {type(value).__name__}")
    return value


def _check_depth(yaml: Any, text: str, path: Path) -> None:
    """Refuse deep nesting and aliases on the flat event stream, before anything recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}:{line}: must not nest deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}:{line}: aliases are not allowed; write the value out (*{event.anchor})")


def _plain_node(yaml: Any, node: Any, path: Path) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}:{at}: keys must be text")
            if key.value in result:
                raise ConfigError(f"{path}:{at}: {key.value} is given twice; give each key once")
            result[key.value] = _plain_node(yaml, value, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain_node(yaml, v, path) for v in node.value]
    if node.tag != "tag:yaml.org,2002:str":
        raise ConfigError(f"{path}:{line}: tags are not allowed; found {node.tag}")
    return _plain_scalar(node.value, quoted=node.style is not None)


def _plain_scalar(text: str, *, quoted: bool) -> Any:
    if quoted:
        return text
    if text in ("true", "false"):
        return text == "true"
    if text in ("", "null", "~"):
        return None
    if re.fullmatch(r"[+-]?[0-9][0-9_]*", text) and len(text) < 40:
        return int(text)
    if re.fullmatch(r"[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][+-]?[0-9]+)?", text) and len(text) < 400:
        return float(text)
    return text


def _comments(source: str) -> dict[int, str]:
    """Trailing comment of each line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def _is_known_type(annotation: str) -> bool:
    optional = re.fullmatch(r"Optional\[(.+)\]", annotation)
    base = optional[1] if optional else annotation
    return base in _WORDS or bool(re.fullmatch(rf"list\[({'|'.join(_SCALARS)})\]", base))


def _as_type(kind: str, value: Any, depth: int) -> Any:
    """`value` as `kind`, or ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int" and number and math.isfinite(value) and value == int(value) and abs(value) < 2**63:
        return int(value)
    if kind == "int" and isinstance(value, str):
        try:
            return parse_count(value)
        except ConfigError:
            raise ValueError from None
    if kind == "float" and number and math.isfinite(value):
        return float(value)
    if kind in ("str", "bool") and isinstance(value, _SCALARS[kind]):
        return value
    if kind == "dict" and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _as_json(v, depth + 1) for k, v in value.items()}
    if kind.startswith("list") and isinstance(value, list | tuple):
        inner = kind[5:-1]
        return [_as_type(inner, v, depth + 1) if inner else _as_json(v, depth + 1) for v in value]
    raise ValueError


def _as_json(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return _as_type("int" if isinstance(value, int) else "float", value, depth)
    return _as_type("dict" if isinstance(value, dict) else "list", value, depth)


def _from_text(kind: str, text: str) -> Any:
    """The JSON value that `text` stands for, given the wanted type. Raises ValueError."""
    word = text.strip()
    if kind == "str":
        return text
    if kind == "bool":
        return {"true": True, "false": False}.get(word.lower(), word)
    if kind in ("int", "float"):
        if re.fullmatch(r"[0-9][0-9_]*(\.[0-9]+)?[KMBTkmbt]", word):
            return parse_count(word)
        return int(word) if kind == "int" and re.fullmatch(r"[+-]?[0-9_]+", word) else float(word)
    if word.startswith(("[", "{")):
        return json.loads(word, parse_constant=lambda name: name)
    inner = kind[5:-1] or "str"
    return [_from_text(inner, item) for item in word.split(",")] if kind.startswith("list") and word else []


def _short(value: Any) -> str:
    """The value for a message; huge integers have no decimal text."""
    try:
        text = repr(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) < 100 else text[:99] + "…"
