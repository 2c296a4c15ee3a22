"""The expected values of a field in words: for error messages, `flcompress passes NAME` and the recipe reference."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_SIMPLE: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def expected(field: FieldInfo) -> str:
    """Return the expected values in words, such as "a number between 0 and 1" or "one of elbo, uniform"."""
    return _words(field.annotation, field.metadata)


def default(field: FieldInfo) -> str | None:
    """Return the default as it is written in a recipe; None if the field is required."""
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else shown(value)


def shown(value: Any) -> str:
    """Return a value as it is written in a recipe, on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return shown(value.value)
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case str():
            return repr(value) if not value or value != value.strip() or ": " in value else value
        case BaseModel():
            return shown(value.model_dump(by_alias=True, exclude_none=True))
        case Mapping():
            return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
        case list() | tuple() | set() | frozenset():
            return "[" + ", ".join(shown(item) for item in value) + "]"
        case _:
            return str(value)


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    metadata = list(metadata)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return f"one of {', '.join(map(shown, arguments))}" if len(arguments) > 1 else shown(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _words(part, metadata) for part in arguments)
    if origin in (tuple, list, set, frozenset):
        return _list(origin, arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(shown(member) for member in annotation)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = (field.alias or name for name, field in annotation.model_fields.items())
        return f"a mapping with {', '.join(keys)}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    words = _SIMPLE.get(annotation, getattr(annotation, "__name__", str(annotation)))
    limits = _limits(metadata)
    return f"{words} {limits}" if limits else words


def _list(origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is tuple and Ellipsis not in arguments:
        parts = [_words(part) for part in arguments]
        same = len(set(parts)) == 1
        return f"a list of {len(parts)}: [{', '.join([parts[0]] * len(parts) if same else parts)}]"
    return f"a list, each {_words(arguments[0])}" if arguments else "a list"


def _limits(metadata: Iterable[Any]) -> str:
    at_least = above = at_most = below = pattern = None
    for item in metadata:
        match item:
            case annotated_types.Ge():
                at_least = item.ge
            case annotated_types.Gt():
                above = item.gt
            case annotated_types.Le():
                at_most = item.le
            case annotated_types.Lt():
                below = item.lt
            case _:
                pattern = getattr(item, "pattern", None) or pattern
    if at_least is not None and at_most is not None:
        return f"between {shown(at_least)} and {shown(at_most)}"
    parts = [
        f"{words} {shown(limit)}"
        for words, limit in (("of at least", at_least), ("above", above), ("of at most", at_most), ("below", below))
        if limit is not None
    ]
    return " and ".join(parts) if parts else f"matching {pattern}" if pattern else ""
