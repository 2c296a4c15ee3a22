"""SIGKILL of any process at any moment, then the same command: the same weights and figures, bit for bit."""

from __future__ import annotations

import pytest

from tests.training.home import Home
from tests.training.killing import killed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ddp", "zero2", "fsdp2"])
def test_a_killed_training_ends_as_an_unbroken_one(home: Home, engine: str) -> None:
    assert len(list(killed(home, engine, 5, seed=0))) == 5
