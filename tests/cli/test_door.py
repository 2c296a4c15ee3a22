"""The public door, in a fresh interpreter."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flcompress


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_loads_nothing() -> None:
    code = "import sys, flcompress; print([n for n in ('torch', 'pydantic', 'networkx') if n in sys.modules])"
    assert python(code) == "[]"


def test_what_it_opens() -> None:
    code = "import flcompress; print([callable(getattr(flcompress, n)) for n in flcompress.__all__])"
    assert python(code) == str([True] * len(flcompress.__all__))
    assert flcompress.__all__ == [
        "NotRemovable",
        "apply",
        "bench",
        "encode",
        "evaluate",
        "export",
        "generate",
        "inspect",
        "load_recipe",
        "plan",
        "remap_lora",
        "remove",
        "report",
        "skip",
        "sweep",
        "trace",
    ]


def test_no_room_hides_a_function() -> None:
    """An imported module becomes an attribute of the package, in place of a function of that name."""
    rooms = {module.name for module in pkgutil.iter_modules(flcompress.__path__)}
    assert not rooms & set(flcompress.__all__)


def test_what_it_does_not_open() -> None:
    with pytest.raises(AttributeError, match="module 'flcompress' has no attribute 'nothing'"):
        flcompress.nothing  # type: ignore[attr-defined] # noqa: B018


def test_one_version() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == flcompress.__version__
