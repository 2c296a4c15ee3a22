"""Back ends by name and options, and the options of all of them; loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from flcompress.core.backend import Backend
from flcompress.core.registry import find_backend, known_backends, nearest
from flcompress.errors import RequestError
from flcompress.frontend.describe import expected


def choose_backends(names: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Backend]:
    """Return the named back ends, each with those options that it has.

    Args:
        names: of installed back ends.
        options: field -> value; every one must be a field of at least one of them.

    Raises:
        RequestError: an unknown back end, an option that none of them has, or a value that it does not take.
    """
    kinds, options = [find_backend(name) for name in names], options or {}
    for option, value in options.items():
        if not any(option in kind.model_fields for kind in kinds):
            have = sorted({field for kind in kinds for field in kind.model_fields})
            who = f"backend {names[0]} has" if len(names) == 1 else f"none of the backends {', '.join(names)} has"
            raise RequestError(f"{flag(option)}: {value} given, but {who} no such option; {_those_of(option, have)}")
    return [_make(kind, {key: value for key, value in options.items() if key in kind.model_fields}) for kind in kinds]


def choose_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """Return one back end; see `choose_backends`."""
    return choose_backends([name], options)[0]


def known_options() -> dict[str, list[type[Backend]]]:
    """Return option -> the installed back ends that have it, in their order."""
    owners: dict[str, list[type[Backend]]] = {}
    for name in known_backends():
        kind = find_backend(name)
        for option in kind.model_fields:
            owners.setdefault(option, []).append(kind)
    return owners


def flag(option: str) -> str:
    """Return an option as it is written on the command line."""
    return f"--{option.replace('_', '-')}"


def values_of(field: FieldInfo) -> str:
    """Return what an option takes, in words; one that is left out takes its default."""
    return expected(field).removesuffix(" or null")


def _make(kind: type[Backend], options: dict[str, Any]) -> Backend:
    try:
        return kind(**options)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if not fault["loc"]:  # of several options
            raise RequestError(f"backend {kind.name}: {fault['ctx']['error']}") from error
        option = str(fault["loc"][0])
        wanted = f"{options[option]} given, expected {values_of(kind.model_fields[option])}"
        raise RequestError(f"{flag(option)}: {fault.get('ctx', {}).get('error', wanted)}") from error


def _those_of(option: str, have: list[str]) -> str:
    if not have:
        return "leave it out"
    return nearest(flag(option), [flag(name) for name in have])
