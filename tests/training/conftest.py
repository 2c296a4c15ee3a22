from __future__ import annotations

import pytest

from tests.training import toy
from tests.training.faulty import command
from tests.training.home import Home
from tests.training.processes import run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home.make(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def whole(home: Home) -> bytes:
    """The weights that the training gives in which no fault is met."""
    folder = home.begun(home.folder / "faults-whole/run")
    run(command(home, folder), home.folder / "faults-output", processes=2)
    return toy.weights(folder)
