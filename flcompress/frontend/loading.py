"""From a recipe file to a checked `Recipe`; every fault becomes one line with file, line, key, given and expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from flcompress.core.program import Fact
from flcompress.core.registry import PASSES, find_exporter, find_pass
from flcompress.core.steps import Exporter, Pass
from flcompress.errors import PreconditionError, RecipeError
from flcompress.frontend.describe import shown
from flcompress.frontend.faults import first_fault
from flcompress.frontend.overrides import override
from flcompress.frontend.recipe import Recipe
from flcompress.frontend.yaml12 import Loc, Located, load_yaml

M = TypeVar("M", bound=BaseModel)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, check every key, and check that each pass's needs are met by the passes before it.

    Args:
        path: the YAML file.
        overrides: "key.path=value" each, the value as YAML: "seed=3", "passes.dmd.steps=10", "passes[0].draws=8".

    Raises:
        RecipeError: one line with file, line and key; what was given; what was expected.
        PreconditionError: a pass stands where its needs are not met.
    """
    path = Path(path)
    located = load_yaml(path)
    top = located.data
    if not isinstance(top, dict):
        raise RecipeError(f"{path}: {shown(top)} given, expected a mapping with version, model and passes")
    if isinstance(top.get("model"), str):
        top["model"] = {"path": top["model"]}
    for key in ("passes", "exports"):
        _name_steps(located, key)
    for text in overrides:
        override(located, text)
    passes = [_step(located, ("passes", index), find_pass) for index in range(len(top.get("passes", [])))]
    exports = [_step(located, ("exports", index), find_exporter) for index in range(len(top.get("exports", [])))]
    top.setdefault("name", path.stem)
    rest = {key: value for key, value in top.items() if key not in ("passes", "exports")}
    recipe = validate(Recipe, rest, located, ())
    recipe = recipe.model_copy(update={"passes": tuple(passes), "exports": tuple(exports)})
    recipe = recipe.written_in(path, {_key(loc): origin for loc, origin in located.origins.items() if 0 < len(loc) < 3})
    check_flow(recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=110, allow_unicode=True)


def check_flow(recipe: Recipe) -> None:
    """Follow the facts through the passes, and the exporters' order; nothing is run.

    Raises:
        PreconditionError: a pass needs a fact that nothing before it gives.
        RecipeError: a pass that reads data in a recipe without or draws clips of another kind, a repeated export, or
            one that stands too early.
    """
    facts = frozenset({Fact.TRAINED}) if recipe.model.weights == "trained" else frozenset[Fact]()
    for index, step in enumerate(recipe.passes):
        try:
            after = step.flow(facts)
        except PreconditionError as error:
            givers = _givers(step.needs - facts)
            fix = f"; put {givers} before it" if givers else ""
            raise PreconditionError(f"{recipe.where(f'passes[{index}]')}.{error}{fix}") from error
        if step.needs_data and recipe.data is None:
            raise RecipeError(
                f"{recipe.where(f'passes[{index}]')}.{step.name}: reads clips, but the recipe has no data:; "
                "add one, such as data: {moving-digits: {clips: 2048}}"
            )
        if step.own_clips is not None and recipe.data is not None and recipe.data.kind != step.own_clips:
            raise RecipeError(
                f"{recipe.where(f'passes[{index}]')}.{step.name}: draws clips of its own from {step.own_clips}, but "
                f"the recipe has data.{recipe.data.kind}, which it would not read; remove this pass, or set "
                f"data: {{{step.own_clips}: {{clips: 2048}}}}"
            )
        facts = after
    seen: list[str] = []
    for index, export in enumerate(recipe.exports):
        where = f"{recipe.where(f'exports[{index}]')}.{export.name}"
        if export.name in seen:
            raise RecipeError(f"{where}: given twice, expected once; remove one")
        missing = [name for name in export.after if name not in seen]
        if missing:
            raise RecipeError(f"{where}: reads what {', '.join(missing)} writes; put {', '.join(missing)} before it")
        seen.append(export.name)


def _givers(facts: frozenset[Fact]) -> str:
    """The built-in passes that give the first of these facts."""
    fact = min(facts)
    return " or ".join(name for name in PASSES if fact in find_pass(name).gives)


def _name_steps(located: Located, key: str) -> None:
    """Bring every step of a list to `{name: {arguments}}`, in place."""
    steps = located.data.get(key, [])
    if not isinstance(steps, list):
        example = "- prune: {remove: 0.3}" if key == "passes" else "- diffusers: {}"
        raise RecipeError(f"{located.where((key,))}: {shown(steps)} given, expected a list such as {example}")
    for index, step in enumerate(steps):
        if isinstance(step, str):
            step = {step: {}}
        if not isinstance(step, dict) or len(step) != 1:
            raise RecipeError(
                f"{located.where((key, index))}: {shown(step)} given, expected one name with its arguments; "
                "start every step with its own '- '"
            )
        ((name, arguments),) = step.items()
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RecipeError(
                f"{located.where((key, index, name))}: {shown(arguments)} given, expected a mapping of arguments "
                f"(see flcompress passes {name})"
            )
        steps[index] = {name: arguments}


S = TypeVar("S", Pass, Exporter)


def _step(located: Located, loc: Loc, find: Callable[[str], type[S]]) -> S:
    ((name, arguments),) = located.data[loc[0]][loc[1]].items()
    try:
        kind = find(name)
    except RecipeError as error:
        raise RecipeError(f"{located.where(loc)}: {error}") from error
    return validate(kind, arguments, located, (*loc, name))


def validate(kind: type[M], arguments: dict[str, Any], located: Located, loc: Loc) -> M:
    """Return the model of a mapping at `loc` of a file; RecipeError names the file, the line and the key of a fault."""
    try:
        # JSON mode is the strict one that still takes a list for a tuple and a text for a path.
        return kind.model_validate_json(json.dumps(arguments), strict=True)
    except ValidationError as error:
        inner, words = first_fault(error, kind, arguments)
        raise RecipeError(f"{located.where((*loc, *inner))}: {words}") from error


def _key(loc: Loc) -> str:
    return str(loc[0]) if len(loc) == 1 else f"{loc[0]}[{loc[1]}]"
