"""`--set key.path=value`: change one value of a recipe from the command line."""

from __future__ import annotations

import re
from typing import Any

from flcompress.errors import RecipeError
from flcompress.frontend.yaml12 import Loc, Located, parse_yaml

_FORM = re.compile(r"(?P<key>[^=\s]+)=(?P<value>.*)", re.DOTALL)
_STEPS = ("passes", "exports")


def override(located: Located, text: str) -> None:
    """Set one value in place. Steps of `passes` and `exports` are named by place or by name.

    Raises:
        RecipeError: not "key=value", or a step that the recipe does not have. A key that no step or section knows is
            found when the recipe is checked.
    """
    origin = f"--set {text}"
    match = _FORM.fullmatch(text)
    if match is None:
        raise RecipeError(f"{origin}: expected key.path=value, such as passes.dmd.steps=10")
    parts = [part for part in re.split(r"[.\[\]]+", match["key"]) if part]
    loc, holder = _walk(located.data, parts, origin)
    value = parse_yaml(match["value"], origin)
    leaf = loc[-1]
    for old in [known for known in located.origins if known[: len(loc)] == loc]:
        del located.origins[old]
    located.origins[loc] = origin
    located.origins.update({(*loc, *inner): origin for inner in value.origins})
    holder[leaf] = value.data


def _walk(top: dict[str, Any], parts: list[str], origin: str) -> tuple[Loc, dict[str | int, Any]]:
    """Return the full location that `parts` name, and the mapping that holds its last key."""
    if parts[0] in _STEPS:
        return _walk_step(top, parts, origin)
    loc: Loc = ()
    holder: Any = top
    for part in parts[:-1]:
        loc = (*loc, part)
        if holder.get(part) is None:
            holder[part] = {}
        holder = holder[part]
        if not isinstance(holder, dict):
            raise RecipeError(f"{origin}: {part} holds {holder!r}, not a mapping; set {part} itself")
    return (*loc, parts[-1]), holder


def _walk_step(top: dict[str, Any], parts: list[str], origin: str) -> tuple[Loc, dict[str | int, Any]]:
    steps: list[dict[str, Any]] = top.get(parts[0], [])
    names = [next(iter(step)) for step in steps]
    if len(parts) == 1:
        raise RecipeError(f"{origin}: {parts[0]} cannot be set as a whole; set an argument, as passes.dmd.steps=10")
    if parts[1].isdecimal():
        index = int(parts[1])
        if index >= len(steps):
            raise RecipeError(f"{origin}: no {parts[0]}[{index}]; the recipe has {len(steps)}, counted from 0")
    elif names.count(parts[1]) == 1:
        index = names.index(parts[1])
    else:
        trouble = f"{names.count(parts[1])} steps are named" if parts[1] in names else "no step is named"
        hint = "name it by index, as passes[0]" if parts[1] in names else f"the recipe has {', '.join(names) or 'none'}"
        raise RecipeError(f"{origin}: {trouble} '{parts[1]}' in {parts[0]}; {hint}")
    rest = parts[2:]
    if parts[1].isdecimal() and len(rest) > 1 and rest[0] == names[index]:
        rest = rest[1:]
    if len(rest) != 1:
        raise RecipeError(f"{origin}: expected one argument of {names[index]}, such as {parts[0]}.{names[index]}.x=1")
    return (parts[0], index, names[index], rest[0]), steps[index][names[index]]
