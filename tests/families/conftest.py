"""Every family's tiny pipeline on disk, once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.families.pipelines import save


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("families")

    @cache
    def folder(name: str) -> Path:
        return save(name, home / name)

    return folder
