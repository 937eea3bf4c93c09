"""Configurations as TOML and back: strict keys and types, dotted overrides, all problems at once."""

import dataclasses
import json
import re
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from tinylab.config.counts import parse_count
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError, did_you_mean

MAX_BYTES = 1_000_000
MAX_PROBLEMS = 20
"""Of one configuration, in one message."""
_LONG_KEY = re.compile(r"""(?:[\w"'-]+\s*\.\s*){50}""")
"""No configuration is that deep, and tomllib takes quadratic time and memory for it."""


def load_run(path: str | Path) -> RunConfig:
    """The run configuration in a TOML file. Raises ConfigError naming the file and every problem."""
    return parse_run(read_text(Path(path), "configuration").encode(), where=str(path))


def parse_run(content: bytes, where: str) -> RunConfig:
    """The run configuration in the bytes of a TOML file. Raises ConfigError with `where` and every problem."""
    try:
        text = content.decode()
        if found := _LONG_KEY.search(text):
            raise ConfigError(f"{where}: a key must have at most 50 parts; found {found[0][:40]}… Check that line")
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    return run_from_dict(values, where=where)


def run_from_dict(values: dict[str, Any], where: str = "configuration") -> RunConfig:
    """A configuration from nested dictionaries, as in TOML. Raises ConfigError with every problem found."""
    problems: list[str] = []
    result = _build(RunConfig, values, "", problems)
    if problems:
        more = len(problems) - MAX_PROBLEMS
        shown = [*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ConfigError(f"{where}: " + "; ".join(shown))
    return result


def run_to_dict(value: Any) -> Any:
    """A configuration as new, nested plain values; absent fields (None) are left out, as in TOML."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {k: run_to_dict(v) for k, v in pairs if v is not None}
    if isinstance(value, tuple):
        return [run_to_dict(v) for v in value]
    return dict(value) if isinstance(value, dict) else value


def run_to_toml(run: RunConfig | dict[str, Any]) -> str:
    """The whole configuration (or its plain values) as TOML; `load_run` gives an equal configuration back."""
    lines: list[str] = []
    _write_table(run_to_dict(run), "", lines)
    return "\n".join(lines).strip() + "\n"


def override(run: RunConfig, assignments: list[str] | tuple[str, ...]) -> RunConfig:
    """The run with dotted keys replaced, e.g. `optimizer.lr=1e-3`, `stages.0.tokens=1M`, `model.rope_theta=5e5`.

    Values are TOML; bare words are text, `none` removes an optional key, counts may end in K, M, B or T.
    Raises ConfigError for an unknown key (with the nearest name), a repeated key or a wrong type.
    """
    values = run_to_dict(run)
    seen: set[str] = set()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"an override must look like key=value; found {assignment!r}")
        if key in seen:
            raise ConfigError(f"{key} is set twice; give each key once")
        seen.add(key)
        _set(values, key, text.strip())
    return run_from_dict(values, where="--set")


def _set(values: dict[str, Any], key: str, text: str) -> None:
    *parents, last = key.split(".")
    target: Any = values
    for name in parents:
        if isinstance(target, list):
            target = target[_list_index(target, name, key)]
        elif isinstance(target, dict):
            target = target.setdefault(name, {})
        if not isinstance(target, dict | list):
            raise ConfigError(f"unknown key {key}: {name} holds a value, not a section")
    value = _parse_value(text, key)
    if isinstance(target, list):
        target[_list_index(target, last, key)] = value
    else:
        target[last] = value


def _list_index(items: list[Any], name: str, key: str) -> int:
    """Position of a list's item, given as that or as its `name` field."""
    for i, item in enumerate(items):
        if name == str(i) or (isinstance(item, dict) and item.get("name") == name):
            return i
    known = [str(i) for i in range(len(items))] + [i["name"] for i in items if isinstance(i, dict) and "name" in i]
    raise ConfigError(f"unknown key {key}: {name!r} must be one of {', '.join(known)}")


def _parse_value(text: str, key: str) -> Any:
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[0-9][0-9_]*(\.[0-9]+)?[KMBTkmbt]", text):
        return parse_count(text, key)
    try:
        values = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return values["v"] if len(values) == 1 else text


def read_text(path: Path, kind: str) -> str:
    """The text of a file that a user wrote. Raises ConfigError if it cannot be read or is larger than 1 MB."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"{path} must be at most {MAX_BYTES} bytes; found {max(len(content), path.stat().st_size)}"
            )
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {kind} {path}: {error}") from error


def _build(kind: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """Build dataclass `kind` from a dictionary, adding to `problems` what does not fit."""
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.') or 'the configuration'} must be a section; found {values!r}")
        return None
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    before = len(problems)
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            hint = did_you_mean(key, names, f"known: {', '.join(names)}").replace("mean ", f"mean {prefix}", 1)
            problems.append(f"unknown key {prefix}{key}; {hint}")
        else:
            kwargs[key] = _convert(hints[key], value, prefix + key, problems)
    if len(problems) > before:
        return None
    try:
        return kind(**kwargs)
    except ConfigError as error:
        problems.append(str(error))
    except TypeError as error:
        problems.append(f"{prefix.rstrip('.')}: {error}")
    return None


def _convert(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value` as the annotated type `hint`, or a line in `problems`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, key, problems)
    if origin is typing.Literal:
        if value not in args:
            hint = did_you_mean(value, args)
            problems.append(f"{key} must be one of {', '.join(map(str, args))}; found {value!r}{hint and '; ' + hint}")
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key + ".", problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{key} must be a list; found {value!r}")
            return ()
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            problems.append(f"{key} must hold {len(kinds)} values; found {len(value)}")
            return ()
        items = zip(kinds, value, strict=True)
        return tuple(_convert(k, v, f"{key}.{i}", problems) for i, (k, v) in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{key} must be a section; found {value!r}")
            return {}
        given = {str(k): v for k, v in value.items() if v is not None}
        return {k: _convert(args[1], v, f"{key}.{k}", problems) for k, v in given.items()}
    return _convert_scalar(hint, value, key, problems)


def _convert_scalar(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is int and is_number and abs(value) < 2**63 and value == int(value):
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    names = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}
    problems.append(f"{key} must be {names[hint]}; found {value!r}")
    return value


def _write_table(table: dict[str, Any], prefix: str, lines: list[str]) -> None:
    scalars = {k: v for k, v in table.items() if not _is_section(v)}
    lines += [f"{_key(k)} = {_scalar(v)}" for k, v in scalars.items()]
    for key, value in table.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, dict):
            lines += ["", f"[{name}]"]
            _write_table(value, name + ".", lines)
        elif _is_section(value):
            for item in value:
                lines += ["", f"[[{name}]]"]
                _write_table(item, name + ".", lines)


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(v) for v in value) + "]"
    return repr(value)
