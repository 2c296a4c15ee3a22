"""Looks on split weights: a moving average that was looked at must leave nothing behind in the training."""

from __future__ import annotations

import pytest

from tests.fixtures.rounding import rounding
from tests.training.comparing import STEP, applied, difference
from tests.training.home import Home

PASSES = (
    "dmd: {steps: 3, critic_updates: 1, batch: 2, learning_rate: 0.1, critic_learning_rate: 0.1, student_steps: 2}",
)
LOOKS = "training.health.every=1", "training.health.samples=2"
UPDATES = 6
"""Three of the critic, three of the generator."""


class LeftGathered:
    """A fault: what a look wrote into the weights is not taken back where they were gathered before."""

    def __call__(self) -> None:
        from flcompress.training.engines.fsdp import Shards

        Shards.shards_changed = lambda self: None  # type: ignore[method-assign]


@pytest.mark.slow
def test_looks_on_two_processes_are_those_of_one(home: Home) -> None:
    """fully_shard keeps what lies outside the blocks gathered after a forward without backward, averaged as it was."""
    alone = applied(home, "looks", PASSES, "local", 1, *LOOKS)
    found = difference(home.model, alone, applied(home, "looks", PASSES, "fsdp2", 2, *LOOKS))
    print(found)
    found.require(UPDATES)
    wrong = difference(home.model, alone, applied(home, "left", PASSES, "fsdp2", 2, *LOOKS, fault=LeftGathered()))
    print(wrong)
    assert wrong.weights > 100 * rounding(UPDATES * STEP)
