"""YAML as recipes are written in it: a strict, safe subset of YAML 1.2 that remembers where every key stands.

PyYAML follows YAML 1.1: it reads `1e-5` as a string, `no` as false, `010` as 8, and keeps the last of two equal keys.
Here numbers and booleans follow YAML 1.2, equal keys are an error, and so are tags, anchors and numbers that are not
finite.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flcompress.errors import RecipeError

Loc = tuple[str | int, ...]
"""Where a value stands: keys and list places from the top."""

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes; the values are made by `_Reader`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (declared so by PyYAML)


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Located:
    """Plain data, and for every value the place its key was written at ("recipes/x.yaml:12" or "--set seed=1")."""

    data: Any
    origins: dict[Loc, str]

    def origin(self, loc: Loc) -> str:
        """Return the file and line of `loc`, or of the nearest key around it that has one."""
        while loc and loc not in self.origins:
            loc = loc[:-1]
        return self.origins[loc]

    def where(self, loc: Loc) -> str:
        """`origin` and the dotted key: "recipes/x.yaml:12: passes[1].prune.remove"."""
        key = dotted(loc)
        return f"{self.origin(loc)}: {key}" if key else self.origin(loc)


def dotted(loc: Loc) -> str:
    """("passes", 1, "prune", "remove") as "passes[1].prune.remove"."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load_yaml(path: Path) -> Located:
    """Read a recipe file.

    Raises:
        RecipeError: not readable, not YAML, or not in the subset; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error})") from error
    return parse_yaml(text, str(path), lines=True)


def parse_yaml(text: str, origin: str, *, lines: bool = False) -> Located:
    """Read YAML text. `origin` names it in errors; with `lines` the line number is put behind it."""
    reader = _Reader(origin, lines)
    try:
        for token in yaml.scan(text, _Loader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                raise RecipeError(f"{reader.at(token)}: anchors and aliases are not read; write the value out")
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if lines and mark is not None else origin
        problem = getattr(error, "problem", None) or "not YAML"
        raise RecipeError(f"{where}: cannot be read as YAML: {problem}") from error
    reader.origins[()] = origin
    data = None if node is None else reader.value(node, ())
    return Located(data, reader.origins)


class _Reader:
    def __init__(self, origin: str, lines: bool) -> None:
        self._origin = origin
        self._lines = lines
        self.origins: dict[Loc, str] = {}

    def at(self, node: Any) -> str:
        return f"{self._origin}:{node.start_mark.line + 1}" if self._lines else self._origin

    def where(self, node: Any, loc: Loc) -> str:
        return f"{self.at(node)}: {dotted(loc)}" if loc else self.at(node)

    def value(self, node: yaml.Node, loc: Loc) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = []
            for position, item in enumerate(node.value):
                self.origins[(*loc, position)] = self.at(item)
                items.append(self.value(item, (*loc, position)))
            return items
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, loc)
        raise RecipeError(f"{self.where(node, loc)}: tag {node.tag} is not read; leave it out")

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise RecipeError(f"{self.where(key_node, loc)}: a list or mapping as a key, expected a name")
            here = (*loc, key)
            if key in mapping:
                raise RecipeError(
                    f"{self.where(key_node, here)}: given twice, first at {self.origins[here]}; remove one"
                )
            self.origins[here] = self.at(key_node)
            mapping[key] = self.value(value_node, here)
        return mapping

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> str | int | float | bool | None:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        if kind == "float":
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                raise RecipeError(f"{self.where(node, loc)}: {text} given, expected a finite number")
            return number
        if kind == "str":
            return text
        raise RecipeError(f"{self.where(node, loc)}: tag {node.tag} is not read; leave it out")
