from __future__ import annotations

import os

import pytest

from tests.training.home import Home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    # What the fork server and all that it starts inherit: as in a run by hand, where the command line sets both.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return Home.make(tmp_path_factory.mktemp("training"))
