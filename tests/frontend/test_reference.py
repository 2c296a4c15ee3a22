"""The real passes and exporters, as far as recipes see them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from flcompress.core import registry
from flcompress.frontend.loading import dump_recipe, load_recipe
from flcompress.frontend.reference import describe_step

ROOT = Path(__file__).parents[2]
BUILT_IN = {**registry.PASSES, **registry.EXPORTERS}
RECIPES = sorted([*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes/field").glob("*.yaml")])


@pytest.fixture(autouse=True)
def fake_steps() -> None:
    """Here the real ones are known."""


def test_the_written_reference_is_up_to_date() -> None:
    for path, text in runpy.run_path(str(ROOT / "docs" / "reference.py"))["generated"]().items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/reference.py"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_argument_is_described(name: str) -> None:
    kind = registry.find_step(name)
    assert kind.name == name
    described = describe_step(kind)
    assert described["summary"]
    for argument in described["arguments"]:
        assert argument["description"], f"{name}.{argument['name']} has no description"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / path.name
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy).to_dict() == recipe.to_dict()


def test_the_schema_knows_every_name() -> None:
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    for key, names in (("passes", registry.PASSES), ("exports", registry.EXPORTERS)):
        assert set(schema["properties"][key]["items"]["anyOf"][0]["properties"]) == set(names)
