"""What a user asks of a sweep: a file, or a recipe with axes; and the cells that it unfolds into."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flcompress.core.registry import nearest
from flcompress.core.settings import Evaluation, Settings
from flcompress.errors import FlcompressError, RecipeError, RequestError
from flcompress.frontend.loading import check_flow, load_recipe, validate
from flcompress.frontend.recipe import Recipe
from flcompress.frontend.yaml12 import load_yaml, parse_yaml

MOST_CELLS = 1000
"""A grid of more cells is refused unless it is confirmed: it is more often a slip than a wish."""

EVERY_PASS = "*"
"""First part of a key that stands for every pass with that argument."""

Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class Variant(Settings):
    """One recipe of a list: the sweep's own with other settings, without some passes, or another file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="names the cell")
    question: str = Field("", description="what the variant asks, shown in the table")
    recipe: Path | None = Field(None, description="another recipe than the sweep's; looked up next to the sweep file")
    changes: Mapping[str, Any] = Field({}, alias="set", description="key -> value, as for an axis")
    without: tuple[str, ...] = Field((), description="passes that are left out")


class Sweep(Settings):
    """A sweep: every variant with every combination of the axes' values, trained with every seed."""

    version: Literal[1] = Field(description="version of this file format")
    recipe: Path = Field(description="the recipe that the cells are made from; looked up next to this file")
    seeds: int = Field(3, ge=1, le=1000, description="training seeds of every cell: 0, 1, ...")
    axes: Mapping[str, Values] = Field(
        {},
        description="key -> values. A key is that of `--set`; `passes.` is optional, and `*.remove` is the "
        "argument `remove` of every pass that has one, where a share of 0 leaves the pass out",
    )
    variants: tuple[Variant, ...] = Field((), description="a list of recipes; each is combined with the axes")
    base: str | None = Field(None, description="the cell that the others are compared with; default: the first")
    evaluation: Evaluation | None = Field(None, description="size of the comparison; default: the recipe's own")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recipe of a sweep, before its seed is set.

    Attributes:
        name: unique within the sweep; names its folder.
        recipe: the recipe file.
        question: what it asks.
        settings: key -> value of every axis.
        overrides: "key=value" each, as for `load_recipe`.
        without: passes that are left out.
    """

    name: str
    recipe: Path
    question: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    def load(self, seed: int) -> Recipe:
        """Return the checked recipe with a seed; RequestError names the cell."""
        try:
            recipe = load_recipe(self.recipe, (*self.overrides, f"seed={seed}", f"name={self.name}-{seed}"))
            kept = tuple(step for step in recipe.passes if step.name not in self.without)
            recipe = recipe.model_copy(update={"passes": kept, "exports": ()})
            check_flow(recipe)
        except FlcompressError as error:
            raise RequestError(f"cell {self.name}: {error}") from error
        return recipe


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked sweep.

    Attributes:
        name: names the output folder.
        source: the sweep file or the recipe.
        cells: what is trained, the base first.
        seeds: training seeds of each.
        evaluation: size of the comparison, the same for all cells.
        axes: key -> values.
    """

    name: str
    source: Path
    cells: tuple[Cell, ...]
    seeds: int
    evaluation: Evaluation
    axes: Mapping[str, Sequence[Any]]

    @property
    def base(self) -> Cell:
        """The cell that the others are compared with."""
        return self.cells[0]


def read_request(path: Path, axes: Sequence[str] = (), seeds: int | None = None, *, many: bool = False) -> Request:
    """Read a sweep file, or a recipe with axes, and unfold and check its cells.

    Args:
        path: a sweep file, or a recipe.
        axes: "KEY=VALUE,VALUE" each, in addition to those of the file.
        seeds: training seeds of each cell; the file's by default.
        many: whether more than `MOST_CELLS` cells are meant.

    Raises:
        RequestError: a key that does not exist, a value out of range, a name twice; names the cell.
    """
    sweep = _read(path, axes, seeds)
    count = math.prod(map(len, sweep.axes.values())) * max(1, len(sweep.variants))
    if count > MOST_CELLS and not many:
        raise RequestError(
            f"{path}: {count:,} cells with {sweep.seeds} seeds each, expected at most {MOST_CELLS:,}; give --yes "
            "if that is meant"
        )
    cells = _unfold(sweep, path.parent)
    names = [cell.name for cell in cells]
    base = sweep.base or names[0]
    if base not in names:
        raise RequestError(f"{path}: base: {base} given, but no cell has that name; {nearest(base, names)}")
    cells.sort(key=lambda cell: cell.name != base)
    recipes = [cell.load(0) for cell in cells]
    return Request(
        name=path.stem,
        source=path,
        cells=tuple(cells),
        seeds=sweep.seeds,
        evaluation=sweep.evaluation or recipes[0].evaluation,
        axes=sweep.axes,
    )


def _read(path: Path, axes: Sequence[str], seeds: int | None) -> Sweep:
    located = load_yaml(path)
    top = located.data
    if isinstance(top, dict) and "model" in top:  # a recipe: the axes are on the command line alone
        located.data.clear()
        located.data.update(version=1, recipe=str(path.resolve()))
    elif not isinstance(top, dict):
        raise RecipeError(f"{path}: expected a mapping with version, recipe and axes or variants")
    if seeds is not None:
        located.data["seeds"] = seeds
        located.origins["seeds",] = "--seeds"
    parsed = dict(map(_axis, axes))
    if parsed:
        located.data["axes"] = {**(located.data.get("axes") or {}), **parsed}
    sweep = validate(Sweep, located.data, located, ())
    if not sweep.axes and not sweep.variants and "seeds" not in located.data:
        raise RequestError(
            f"{path}: neither axes nor variants given; add --axis passes.dmd.student_steps=1,2,4, or --seeds 3 for "
            "this recipe alone, or write them in a sweep file"
        )
    return sweep


def _axis(text: str) -> tuple[str, list[Any]]:
    """Read "KEY=VALUE,VALUE"; the values are a list in YAML without its brackets."""
    key, equals, values = text.partition("=")
    if not key or not equals or not values.strip():
        raise RequestError(f"--axis {text}: expected KEY=VALUE,VALUE, such as passes.dmd.student_steps=1,2,4")
    return key, list(parse_yaml(f"[{values}]", f"--axis {text}").data)


def _unfold(sweep: Sweep, folder: Path) -> list[Cell]:
    variants = sweep.variants or (Variant(name="cell"),)
    cells: list[Cell] = []
    for variant in variants:
        file = _find(variant.recipe or sweep.recipe, folder)
        passes = _passes_of(file)
        for values in itertools.product(*sweep.axes.values()):
            settings = dict(zip(sweep.axes, values, strict=True))
            name = "-".join([*([variant.name] if sweep.variants else []), *map(_short, settings.items())]) or file.stem
            overrides: list[str] = []
            without = set(variant.without)
            for key, value in {**variant.changes, **settings}.items():
                for full in _keys(key, passes, name):
                    step, _, argument = full.removeprefix("passes.").partition(".")
                    if full.startswith("passes.") and argument == "remove" and value == 0:
                        without.add(step)
                    else:
                        overrides.append(f"{full}={json.dumps(value)}")
            if missing := without - set(passes):
                raise RequestError(
                    f"cell {name}: without: {min(missing)} given, but {file} has no such pass; "
                    f"{nearest(min(missing), list(passes))}"
                )
            cells.append(
                Cell(
                    name=name,
                    recipe=file,
                    question=variant.question,
                    settings=settings,
                    overrides=tuple(overrides),
                    without=frozenset(without),
                )
            )
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"two cells are named {twice}; give the variants other names, or each value of an axis once")
    return cells


def _find(recipe: Path, folder: Path) -> Path:
    """Return the recipe file: next to the sweep file, or from the working directory."""
    for path in (folder / recipe, recipe):
        if path.is_file():
            return path
    raise RequestError(f"recipe {recipe}: no such file next to the sweep, in {folder}, or in the working directory")


def _passes_of(recipe: Path) -> dict[str, tuple[str, ...]]:
    """Return the recipe's passes and their arguments."""
    return {step.name: tuple(type(step).model_fields) for step in load_recipe(recipe).passes}


def _keys(key: str, passes: Mapping[str, Sequence[str]], cell: str) -> list[str]:
    """Return the full keys of a recipe that a key of a sweep stands for."""
    first, _, rest = key.removeprefix("passes.").partition(".")
    if first == EVERY_PASS:
        holders = [f"passes.{name}.{rest}" for name, arguments in passes.items() if rest in arguments]
        if not holders:
            known = sorted({argument for arguments in passes.values() for argument in arguments})
            raise RequestError(f"cell {cell}: {key}: no pass has an argument {rest}; {nearest(rest, known)}")
        return holders
    if key.startswith("passes[") or first in passes:
        return [key if key.startswith("passes") else f"passes.{key}"]
    if key in ("seed", "name"):
        raise RequestError(f"cell {cell}: {key}: the sweep sets it itself; seeds: is the number of training seeds")
    sections = [name for name in Recipe.model_fields if name not in ("version", "passes", "exports")]
    if key.startswith("passes.") or first not in sections:
        raise RequestError(
            f"cell {cell}: {key}: the recipe has no pass or section '{first}'; {nearest(first, [*passes, *sections])}"
        )
    return [key]


def _short(setting: tuple[str, Any]) -> str:
    """("passes.dmd.student_steps", 4) as "student-steps-4"."""
    key, value = setting
    text = f"{key.rpartition('.')[2]}-{json.dumps(value)}".lower()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
