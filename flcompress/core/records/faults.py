"""Say what is wrong in a JSON record: the key, what is given there, and what is expected."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_WORDS = {str: "a text", bool: "true or false", int: "a number", float: "a number"}


def fault_in(error: ValidationError, kind: type[BaseModel], value: object) -> str:
    """Return the first fault in words: "rows[2].ratio is 3, expected an object".

    A fault inside a list of plain values is told of the whole list, which is what the key's field describes.

    Args:
        error: pydantic's, of validating `value` as `kind`.
        kind: the record.
        value: the decoded JSON object.
    """
    fault = error.errors(include_url=False)[0]
    path, node, annotation, owner = "", value, None, kind
    for part in fault["loc"]:
        inner = _model_in(annotation) if annotation is not None else kind
        if isinstance(node, list) and isinstance(part, int) and inner is not None:
            path, node, annotation = f"{path}[{part}]", node[part], inner
            continue
        if not isinstance(node, Mapping) or inner is None:
            break
        owner = inner
        path = f"{path}.{part}" if path else str(part)
        node = node.get(str(part))
        annotation = _annotation(inner, str(part), annotation)
        if annotation is None:
            break
    if fault["type"] == "extra_forbidden":
        return f"unknown key {path}, expected {', '.join(name for name in owner.model_fields if name != 'format')}"
    shown = "nothing" if node is None else json.dumps(node, default=str)[:40]
    return f"{path} is {shown}, expected {_words(annotation) if annotation is not None else fault['msg']}"


def _annotation(model: type[BaseModel], key: str, outer: Any) -> Any:
    """Return the type of a key, or None for an unknown one."""
    if _is_mapping(outer):  # a key of a mapping whose values are objects
        return model
    field = model.model_fields.get(key)
    if field is not None:
        return field.annotation
    extra = model.__annotations__.get("__pydantic_extra__")
    return None if extra is None else _extra(model)


def _extra(model: type[BaseModel]) -> Any:
    from typing import get_type_hints

    return get_args(get_type_hints(model)["__pydantic_extra__"])[1]


def _is_mapping(annotation: Any) -> bool:
    return get_origin(_bare(annotation)) in (dict, Mapping)


def _bare(annotation: Any) -> Any:
    """Return a type without `Annotated` and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _bare(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the record that a type is, or is a list or a mapping of."""
    annotation = _bare(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = get_args(annotation)
    return _model_in(parts[-1]) if get_origin(annotation) in (list, dict) and parts else None


def _words(annotation: Any) -> str:
    annotation = _bare(annotation)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is list:
        inner = _bare(parts[0])
        if get_origin(inner) is tuple:
            return f"a list of rows of {len(get_args(inner))} numbers"
        return {str: "a list of texts", int: "a list of numbers", float: "a list of numbers"}.get(
            inner, "a list of objects"
        )
    if origin is tuple:
        return f"{len(parts)} numbers"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    return _WORDS.get(annotation, "an object")
