"""A batch done in micro batches against the same batch done at once: losses, and weights after the steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.rounding import rounding
from tests.training.comparing import STEP, LastDropped, ShareForgotten, applied, difference
from tests.training.engines.test_engines import DEPTH, MATCHING
from tests.training.home import Home
from tests.training.processes import Hook

pytestmark = pytest.mark.slow

PASSES = (
    "pretrain: {steps: 2, batch: 4, learning_rate: 0.2}",  # it warms up over 200 steps
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: self, alpha: 0.7}}",
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: ema}}",
    "prune: {remove: 0.3, by: middle}",
    f"dmd: {{{MATCHING}, steps: 2, intra_cfg: [0.2, 0.3]}}",
)
UPDATES = 10
"""Two of each training, two of the critic's among them."""
ADVERSARIAL = (*PASSES[:2], PASSES[3], f"dmd: {{{MATCHING}, steps: 2, gan_weight: 0.1}}")
LORA = (
    *PASSES[:2],
    PASSES[3],
    f"dmd: {{{MATCHING}, steps: 2, fake_score: lora, generator: lora, real_score: elastic}}",
)


@pytest.fixture(scope="module")
def whole(home: Home) -> Path:
    return applied(home, "whole", PASSES, "local", 1)


@pytest.mark.parametrize(
    ("engine", "processes", "size", "again"),
    [
        ("local", 1, 3, False),
        ("ddp", 2, 1, False),
        ("zero1", 2, 1, False),
        ("zero2", 2, 1, True),
        ("zero3", 2, 1, True),
        ("fsdp2", 2, 1, True),
    ],
)
def test_micro_batches_equal_the_batch(
    home: Home, whole: Path, engine: str, processes: int, size: int, again: bool
) -> None:
    """With blocks computed again where a model that needs such an engine would."""
    settings = f"training.micro_batch={size}", f"training.gradient_checkpointing={str(again).lower()}"
    found = difference(home.model, whole, applied(home, "parts", PASSES, engine, processes, *settings))
    print(f"{engine}: {found}")
    found.require(UPDATES)


@pytest.mark.parametrize(("name", "fault"), [("share", ShareForgotten()), ("last", LastDropped())])
def test_gradients_that_add_up_wrongly_would_be_found(home: Home, whole: Path, name: str, fault: Hook) -> None:
    """By orders of magnitude: the tests above cannot take such a fault for rounding."""
    found = difference(
        home.model, whole, applied(home, name, PASSES, "local", 1, "training.micro_batch=3", fault=fault)
    )
    print(f"{name}: {found}")
    assert found.weights > 100 * rounding(UPDATES * STEP)
    assert found.logged > 100 * rounding(UPDATES * STEP)


@pytest.mark.parametrize(
    ("passes", "options"), [(ADVERSARIAL, ()), (LORA, ("training.gradient_checkpointing=true",))], ids=["gan", "lora"]
)
def test_of_roles_that_share(home: Home, passes: tuple[str, ...], options: tuple[str, ...]) -> None:
    """The generator's loss leaves gradients in the critic; LoRAs compute on one base, and blocks again."""
    name = "gan" if passes is ADVERSARIAL else "lora"
    one = applied(home, f"{name}-whole", passes, "local", 1, *options)
    found = difference(
        home.model, one, applied(home, f"{name}-parts", passes, "ddp", 2, "training.micro_batch=1", *options)
    )
    print(f"{name}: {found}")
    found.require(UPDATES)
