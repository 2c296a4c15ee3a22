"""Pydantic's complaints in the recipe's own words."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flcompress.core.registry import nearest
from flcompress.frontend.describe import default, expected, shown
from flcompress.frontend.yaml12 import Loc


def first_fault(error: ValidationError, kind: type[BaseModel], arguments: dict[str, Any]) -> tuple[Loc, str]:
    """Return the location of the first fault within `arguments`, and what is wrong there."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    if fault["type"] == "missing":  # a misspelt key is also a missing one, and its name says more
        siblings = (other for other in faults if other["loc"][:-1] == fault["loc"][:-1])
        fault = next((other for other in siblings if other["type"] == "extra_forbidden"), fault)
    loc, field, owner = _follow(fault["loc"], kind, arguments)
    complete = len(loc) == len(fault["loc"])
    if complete and fault["type"] == "extra_forbidden":
        return loc, f"unknown key; {nearest(str(loc[-1]), _keys(owner))}"
    if complete and fault["type"] == "missing":
        return loc, f"missing, expected {expected(field)}" if field is not None else "missing"
    if fault["type"] in ("value_error", "assertion_error"):
        return loc, str(fault["ctx"]["error"])
    if field is None:
        return loc, f"{shown(fault['input'])} given; {fault['msg']}"
    fallback = default(field)
    hint = f"; the default is {fallback}" if fallback is not None else ""
    value: Any = arguments
    for part in loc:
        value = value[part]
    return loc, f"{shown(value)} given, expected {expected(field)}{hint}"


def _follow(loc: Loc, kind: type[BaseModel], arguments: Any) -> tuple[Loc, FieldInfo | None, type[BaseModel]]:
    """Return the part of pydantic's location that exists in the file (it adds names of union members), and its field.

    A fault inside a list is reported for the whole list, which is what the field describes.
    """
    path: list[str | int] = []
    field: FieldInfo | None = None
    for part in loc:
        inside = _model(field) if field is not None else kind
        if inside is None:
            break
        kind = inside
        fields = {info.alias or name: info for name, info in kind.model_fields.items()}
        path.append(part)
        field = fields.get(str(part))
        if field is None:
            break
        arguments = arguments.get(part) if isinstance(arguments, dict) else None
    return tuple(path), field, kind


def _model(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((part for part in options if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]
