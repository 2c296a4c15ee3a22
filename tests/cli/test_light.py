"""What stays light: in a fresh interpreter, checking a recipe and reading a run load neither torch nor diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting.synthetic import write_run

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(code: str, *arguments: str | Path) -> str:
    """Run `code` and return which heavy packages are loaded after it."""
    end = "\nprint([n for n in ('torch', 'diffusers', 'transformers', 'accelerate') if n in sys.modules])"
    command = [sys.executable, "-c", f"import sys\n{code}{end}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def loaded_by(*arguments: str | Path) -> str:
    return loaded(
        "from flcompress.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code", *arguments
    )


def test_the_rooms_that_read_recipes_and_runs() -> None:
    assert loaded("import flcompress.api, flcompress.frontend.loading, flcompress.frontend.listing") == "[]"
    assert loaded("import flcompress.core.registry, flcompress.core.attempts, flcompress.reporting.html") == "[]"


def test_a_checked_recipe() -> None:
    assert loaded("import flcompress\nflcompress.load_recipe(sys.argv[1])", RECIPES / "smoke.yaml") == "[]"


def test_a_misspelt_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "smoke.yaml").read_text(encoding="utf-8").replace("seed:", "sead:"), encoding="utf-8")
    code = """
import flcompress
try:
    flcompress.load_recipe(sys.argv[1])
except Exception as error:
    assert "sead: unknown key; did you mean 'seed'?" in str(error)
else:
    raise AssertionError
"""
    assert loaded(code, recipe) == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--help"),
        ("generate", "--help"),
        ("bench", "--help"),
        ("passes",),
        ("passes", "dmd"),
        ("passes", "onnx"),
    ],
)
def test_commands_that_need_no_model(arguments: tuple[str, ...]) -> None:
    assert loaded_by(*arguments) == "[]"


def test_report(tmp_path: Path) -> None:
    assert loaded_by("report", write_run(tmp_path / "run")) == "[]"
