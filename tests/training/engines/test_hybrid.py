"""Weights that are split over some of the processes, with a copy in each group, against one process (HSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from flcompress.core.settings import Training
from tests.training.comparing import applied
from tests.training.engines.test_engines import DEPTH, MATCHING, compared
from tests.training.home import Home

pytestmark = pytest.mark.slow

PASSES = (
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self}}",
    f"dmd: {{{MATCHING}, steps: 1}}",
)
UPDATES = 4


@pytest.fixture(scope="module")
def one(home: Home) -> Path:
    return applied(home, "hybrid", PASSES, "local", 1)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("sequence_parallel=2", "micro_batch=1", "gradient_checkpointing=true", "offload=[moments,inputs]"),
    ],
    ids=["plain", "clips-split-and-offload-too"],
)
def test_two_copies_of_two_parts_equal_one_process(home: Home, one: Path, options: Sequence[str]) -> None:
    settings = [f"training.{option}" for option in ("shard_size=2", *options)]
    compared(home, f"hybrid-{len(options)}", PASSES, one, "fsdp2", *settings, processes=4).require(UPDATES)


def test_other_engines_split_over_all() -> None:
    message = "shard_size: 8 given with engine: zero3, expected fsdp2; leave it out, or set engine: fsdp2"
    with pytest.raises(ValidationError, match=message):
        Training(engine="zero3", shard_size=8)
