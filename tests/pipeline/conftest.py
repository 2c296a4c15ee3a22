from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline import fakes
from tests.tiny import tiny_pipeline

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def fake_steps() -> Iterator[None]:
    fakes.CALLS.clear()
    with fakes.installed():
        yield


@pytest.fixture
def write(tmp_path: Path, model: Path) -> WriteRecipe:
    """Write a recipe file that starts from the tiny model; `steps` are its other lines."""

    def make(steps: str, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        head = f"version: 1\nmodel: {model}\nsampling: {{max_sequence_length: 16}}\n"
        path.write_text(head + steps, encoding="utf-8")
        return path

    return make
