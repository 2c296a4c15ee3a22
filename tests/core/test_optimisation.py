"""The arguments that all trainings share: schedules, their bounds, and that old cache keys stay valid."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flcompress.core.optimisation import Optimisation
from flcompress.core.registry import find_pass
from flcompress.core.steps import Pass
from flcompress.frontend.recipe import arguments

TRAINED = ("train-autoencoder", "pretrain", "stochastic-depth", "dmd")


def trained(name: str, **given: Any) -> Any:
    more = {"remove": 0.3} if name == "stochastic-depth" else {}
    return find_pass(name)(**{"steps": 30, **more, **given})


def test_half_a_cosine() -> None:
    factor = Optimisation(steps=30, schedule="cosine", warmup=10).factor
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(10) == pytest.approx(1.0)
    assert factor(20) == pytest.approx(0.02 + 0.98 * 0.5)
    assert factor(15) == pytest.approx(0.02 + 0.49 * (1.0 + math.cos(math.pi / 4)))
    assert factor(30) == factor(40) == pytest.approx(0.02)


def test_a_straight_line() -> None:
    factor = Optimisation(steps=30, schedule="linear", warmup=10, final_ratio=0.2).factor
    assert [factor(step) for step in (10, 15, 20, 30, 40)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_a_constant() -> None:
    assert {Optimisation(steps=30).factor(step) for step in range(40)} == {1.0}
    assert [Optimisation(steps=30, warmup=4).factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@given(
    st.sampled_from(["constant", "cosine", "linear"]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.floats(0.0, 1.0),
)
def test_every_schedule_rises_then_falls_between_its_ends(schedule: Any, steps: int, warmup: int, final: float) -> None:
    warmup = min(warmup, steps)
    factor = Optimisation(steps=steps, schedule=schedule, warmup=warmup, final_ratio=final).factor
    values = [factor(step) for step in range(steps + 1)]
    assert all(0.0 <= value <= 1.0 + 1e-12 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values[warmup:], values[warmup + 1 :], strict=False))
    if schedule != "constant" and steps > warmup:
        assert values[-1] == pytest.approx(final)


def test_a_default_warm_up_is_no_longer_than_the_training() -> None:
    assert trained("pretrain", steps=5).factor(4) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup": 31}, "warmup: 31 given, expected at most the 30 steps; lower it or raise steps"),
        (
            {"ema_decay": 0.9, "ema_start": 30},
            "ema_start: 30 given, expected less than the 30 steps, or no average begins",
        ),
        (
            {"ema_decay": 0.0, "ema_start": 3},
            "ema_start: 3 given with ema_decay: 0, which keeps no average; set ema_decay",
        ),
    ],
)
@pytest.mark.parametrize("name", TRAINED)
def test_settings_that_contradict_each_other(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        trained(name, **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"betas": [0.9, 1.0]},
        {"betas": [-0.1, 0.9]},
        {"weight_decay": -1.0},
        {"clip_grad_norm": 0.0},
        {"final_ratio": 1.5},
        {"schedule": "step"},
    ],
)
def test_values_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        trained("pretrain", **given)


OLD = {
    "train-autoencoder": {"steps", "batch", "learning_rate"},
    "pretrain": {"steps", "batch", "learning_rate", "shift", "caption_dropout", "ema_decay"},
    "stochastic-depth": {
        *("remove", "by", "skip_probability", "alpha", "target", "steps", "batch", "learning_rate", "caption_dropout"),
    },
    "dmd": {
        *("student_steps", "inter_cfg", "intra_cfg", "real_score", "fake_score", "generator", "lora_rank"),
        *("critic_updates", "steps", "batch", "learning_rate", "critic_learning_rate", "score_range", "ema_decay"),
        "gan_weight",
    },
}
"""The arguments of version 0.1, which are in the keys of its results."""


@pytest.mark.parametrize("name", TRAINED)
def test_results_from_before_these_settings_keep_their_key(name: str) -> None:
    assert set(arguments(trained(name))) == OLD[name]
    kept = {"schedule": "constant", "warmup": 1, "weight_decay": 0.1, "betas": [0.5, 0.9], "clip_grad_norm": 2.0}
    if name == "dmd":
        kept["schedule"] = "cosine"
    changed = trained(name, **kept, final_ratio=0.5, ema_decay=0.5, ema_start=2)
    assert set(arguments(changed)) == OLD[name] | set(kept) | {"final_ratio", "ema_decay", "ema_start"}


@pytest.mark.parametrize("name", TRAINED[1:])
def test_the_plan_counts_the_average_and_the_moments(name: str) -> None:
    def roles(step: Pass) -> list[tuple[bool, int]]:
        return [(role.averaged, role.moments) for role in step.cost(100.0, 10, 100.0).roles if role.trained]

    assert roles(trained(name, ema_decay=0.9, betas=[0.9, 0.99]))[0] == (True, 2)
    assert roles(trained(name, ema_decay=0.0, betas=[0.0, 0.99]))[0] == (False, 1)
    assert all(not averaged for averaged, _ in roles(trained(name, ema_decay=0.9))[1:])
