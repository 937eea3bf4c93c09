"""Parameter files: YAML without what hides a value. `4e-4` is a number; `no`, `on` and `12:30` are text."""

import re
from pathlib import Path
from typing import Any

import yaml

from tinylab.config.io import read_text
from tinylab.errors import ConfigError


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with plain words as in JSON; aliases, tags and repeated keys are refused."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own are those of YAML 1.1

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node. Raises ConfigError with its line for an alias or a tag."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, f"aliases are not allowed; write the value out (*{event.anchor})")
        if event.tag is not None:
            raise _refused(event, f"tags are not allowed; found {event.tag}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        """A dictionary whose keys are text. Raises ConfigError with the line of a key that is none, or comes twice."""
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key, "keys must be text")
            if key.value in result:
                raise _refused(key, f"{key.value} is given twice; give each key once")
            result[key.value] = self.construct_object(value, deep=True)
        return result


def _refused(place: Any, problem: str) -> ConfigError:
    return ConfigError(f"{place.start_mark.name}:{place.start_mark.line + 1}: {problem}")


for _tag, _pattern, _first, _convert in (
    ("bool", r"true|false", "tf", lambda text: text == "true"),
    ("null", r"null|~|", ("n", "~", ""), lambda text: None),
    ("int", r"[+-]?[0-9](_?[0-9]){0,38}", "+-0123456789", int),
    ("float", r"[+-]?([0-9](_?[0-9])*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", "+-.0123456789", float),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node, convert=_convert: convert(node.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A parameter file as a dictionary. Raises ConfigError, with file and line, for what is not plain `name: value`."""
    loader = StrictLoader(read_text(Path(path), "parameter file"))
    loader.name = str(path)
    try:
        value = loader.get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path} must hold `name: value` lines; found {type(value).__name__}")
    return value or {}
