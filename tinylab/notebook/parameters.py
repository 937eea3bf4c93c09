"""The parameters of a notebook: read from its tagged cell by syntax, and filled strictly.

papermill alone injects an unknown name with a warning, and guesses types from text.
"""

import ast
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from tinylab.config.counts import parse_count
from tinylab.errors import ConfigError, did_you_mean

_TYPE = re.compile(r"(Optional\[)?((int|float|str|bool|dict|list)|list\[(int|float|str|bool)\])(?(1)\])")
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
    """One line of the tagged cell: `name: type = default`."""

    name: str
    base: str
    """`int`, `float`, `str`, `bool`, `dict`, `list`, or a list of one scalar type such as `list[str]`."""
    optional: bool
    """Whether None is a value: the type is written `Optional[…]`."""
    default: Any

    def accept(self, value: Any) -> Any:
        """`value` as this parameter's type (whole floats become int, ints float). Raises ConfigError otherwise."""
        if value is None and self.optional:
            return None
        try:
            return _as_type(self.base, value)
        except (ValueError, OverflowError, ConfigError):
            raise self._refused(value) from None

    def parse(self, text: str) -> Any:
        """The value written as `text` on a command line; counts may end in K, M, B or T, lists are JSON or a,b,c."""
        if self.optional and text.strip().lower() in ("none", "null"):
            return None
        try:
            return _as_type(self.base, _from_text(self.base, text))
        except (ValueError, OverflowError, RecursionError, ConfigError):
            raise self._refused(text) from None

    def _refused(self, found: Any) -> ConfigError:
        kind, _, inner = self.base.rstrip("]").partition("[")
        wanted = _WORDS[kind] + (f" of {inner}" if inner else "") + (", or none" if self.optional else "")
        return ConfigError(f"parameter {self.name} must be {wanted}; found {found!r:.100}")


def read_cell(source: str, where: str = "parameters cell") -> dict[str, Parameter]:
    """The parameters that a cell's source declares, in order.

    Raises ConfigError, naming line and rule, unless each statement is one `name: type = literal`.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: must be Python; found {error.msg}") from error
    found: dict[str, Parameter] = {}
    for node in statements:
        at = f"{where}, line {node.lineno}"
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ConfigError(f"{at}: must be `name: type = literal`; found {ast.unparse(node)[:80]!r}")
        name, annotation = node.target.id, ast.unparse(node.annotation)
        if name.startswith("__") or name in found:
            raise ConfigError(f"{at}: a name must be plain and declared once; found {name!r}")
        known = _TYPE.fullmatch(annotation)
        if not known:
            types = f"{', '.join(_WORDS)}, list[…] or Optional[…]"
            raise ConfigError(f"{at}: the type must be one of {types}; found {annotation!r}")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ConfigError(f"{at}: the default must be a literal; found {ast.unparse(node.value)!r}") from None
        found[name] = Parameter(name, known[2], known[1] is not None, default)
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
    return f"unknown parameter {name!r}; {hint}"


def _as_type(kind: str, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError, OverflowError or ConfigError if it is something else."""
    if kind == "int" and isinstance(value, str):
        return parse_count(value)
    if kind in ("int", "float") and isinstance(value, int | float) and not isinstance(value, bool):
        if kind == "float" and math.isfinite(value):
            return float(value)
        if kind == "int" and value == int(value) and abs(value) < 2**63:
            return int(value)
    if (kind == "str" and isinstance(value, str)) or (kind == "bool" and isinstance(value, bool)):
        return value
    if kind == "dict" and isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _as_json(v) for k, v in value.items()}
    if kind.startswith("list") and isinstance(value, list | tuple):
        inner = kind[5:-1]
        return [_as_type(inner, v) if inner else _as_json(v) for v in value]
    raise ValueError


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    kinds = (kind for kind, types in (("int", int), ("float", float), ("dict", dict)) if isinstance(value, types))
    return _as_type(next(kinds, "list"), value)


def _from_text(kind: str, text: str) -> Any:
    """The JSON value that `text` stands for, given the wanted type. Raises ValueError or ConfigError."""
    word = text.strip()
    if kind == "str":
        return text
    if kind == "bool":
        return {"true": True, "false": False}.get(word.lower())
    if kind in ("int", "float"):
        if re.fullmatch(r"[0-9][0-9_]*(\.[0-9]+)?[KMBTkmbt]", word):
            return parse_count(word)
        return int(word) if kind == "int" and re.fullmatch(r"[+-]?[0-9_]+", word) else float(word)
    if word.startswith(("[", "{")):
        return json.loads(word)
    inner = kind[5:-1] or "str"
    return [_from_text(inner, item) for item in word.split(",")] if kind.startswith("list") and word else []
