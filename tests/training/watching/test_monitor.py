"""A training that goes wrong is warned, stopped or sent back; a resumed one judges as an unbroken one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flcompress.core.settings import Health
from flcompress.core.steps import PassContext
from flcompress.draws import Draws
from flcompress.errors import TrainingError
from flcompress.training import loop
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import BREACHES_FILE, Limit, Watch
from tests.training.test_loop import no_data, silent

LIMITS = {"lag": Limit(setting="max_critic_lag", high=1.0), "motion": Limit(setting="motion", low=0.5, high=2.0)}


def work(folder: Path, said: list[str] | None = None, **health: Any) -> PassContext:
    said = [] if said is None else said
    return PassContext(
        directory=folder,
        seed=0,
        data=no_data,
        progress=silent,
        say=said.append,
        checkpoint_seconds=0.0,
        health=Health(every=2, **health),
    )


def watch(work: PassContext, figures: Mapping[int, Mapping[str, float]] | None = None) -> Watch:
    return Watch(work, name="test", evaluate=lambda step: (figures or {})[step], held_out="loss", limits=LIMITS)


@pytest.mark.parametrize(
    ("figure", "value", "told"),
    [
        ("lag", 1.5, "lag 1.5, expected at most 1 (training.health.max_critic_lag); lower learning_rate"),
        ("lag", math.nan, "lag nan, expected at most 1 (training.health.max_critic_lag); lower learning_rate"),
        ("motion", 0.25, "motion 0.25, expected at least 0.5 (training.health.motion); lower learning_rate"),
        ("motion", 3.0, "motion 3, expected at most 2 (training.health.motion); lower learning_rate"),
        ("x_grad_norm", 50.0, "x_grad_norm 50, expected at most 9 (training.health.max_grad_norm); "
         "lower learning_rate"),
        ("loss", 7.0, "loss 7, expected at most 6 (training.health.max_worsening); the best evaluation, step 2, had 2: "
         "train for fewer steps, or lower learning_rate"),
    ],
)  # fmt: skip
def test_a_breach_names_figure_value_limit_and_step(figure: str, value: float, told: str, tmp_path: Path) -> None:
    said: list[str] = []
    for action in ("warn", "stop"):
        one = watch(work(tmp_path, said, on_breach=action, max_grad_norm=9.0))
        one.judge(2, {"loss": 2.0, "lag": 1.0, "motion": 0.5, "x_grad_norm": 9.0})
        if action == "warn":
            assert not one.judge(3, {figure: value})
            assert said == [f"warning: test: step 3: {told}; see docs/health.md"]
        else:
            with pytest.raises(TrainingError) as error:
                one.judge(3, {figure: value})
            assert str(error.value) == (
                f"test: step 3: {told}; see docs/health.md; stopped, the last good checkpoint is kept"
            )
    actions = [json.loads(line)["action"] for line in (tmp_path / BREACHES_FILE).read_text().splitlines()]
    assert actions == ["warn", "stop"]


def test_a_figure_that_stays_beyond_its_limit_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    one = watch(work(tmp_path, said, on_breach="warn"))
    for step, lag in enumerate([0.5, 2.0, 3.0, 0.5, 2.0], start=1):
        one.judge(step, {"lag": lag})
    assert [line.split(":")[2] for line in said] == [" step 2", " step 5"]


def test_what_a_pass_starts_from_is_not_judged(tmp_path: Path) -> None:
    one = watch(work(tmp_path))
    one.judge(0, {"loss": 1.0, "lag": 9.0})
    assert one.best == (0, 1.0)


def test_a_look_beyond_a_limit_is_never_the_best(tmp_path: Path) -> None:
    one = watch(work(tmp_path, on_breach="warn"))
    one.judge(2, {"loss": 1.0, "lag": 0.5})
    one.judge(4, {"loss": 0.5, "lag": 5.0})
    assert one.best == (2, 1.0)


def test_no_limit_judges_nothing(tmp_path: Path) -> None:
    nothing = Limit(setting="max_critic_lag")
    one = Watch(
        work(tmp_path, max_worsening=None),
        name="test",
        evaluate=lambda step: {},
        held_out="loss",
        limits={"lag": nothing},
    )
    one.judge(2, {"loss": 1.0, "lag": 1e9})
    one.judge(4, {"loss": 1e9, "lag": 1e9})
    assert not (tmp_path / BREACHES_FILE).exists()


figures = st.fixed_dictionaries(
    {"lag": st.floats(0, 2)}, optional={"loss": st.floats(0.1, 10), "motion": st.floats(0, 3)}
)


@settings(max_examples=60, deadline=None)
@given(st.lists(figures, min_size=1, max_size=12), st.integers(0, 12))
def test_a_resumed_watch_judges_as_an_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, log: list[dict[str, float]], broken_at: int
) -> None:
    lines = [{"step": step, **values} for step, values in enumerate(log)]
    whole_said: list[str] = []
    folder = tmp_path_factory.mktemp("watch")
    whole = watch(work(folder, whole_said, on_breach="warn"))
    after: list[str] = []
    for place, line in enumerate(lines):
        if place == broken_at:
            after = whole_said[:]
        whole.judge(int(line["step"]), line)
    said: list[str] = []
    again = watch(work(folder, said, on_breach="warn"))
    again.resume(lines[:broken_at])
    for line in lines[broken_at:]:
        again.judge(int(line["step"]), line)
    assert again.best == whole.best
    if broken_at < len(lines):
        assert said == whole_said[len(after) :]


def trained(folder: Path) -> TrainedRole:
    torch.manual_seed(0)
    hyper = Hyper(learning_rate=0.05, betas=(0.0, 0.9))  # no momentum: it would go downhill a little longer
    return TrainedRole(engine_of(work(folder)), "model", nn.Linear(3, 1), batch=4, hyper=hyper)


def descend(role: TrainedRole, folder: Path, steps: int, *, hot_from: int = 99, die_at: int = 99, **health: Any) -> int:
    """Fit a line; from step `hot_from` on, walk away from it."""
    given = work(folder, **health)
    fixed = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))

    def error(x: torch.Tensor) -> torch.Tensor:
        return (role.module(x) - x.sum(1, keepdim=True)).square().mean()  # type: ignore[no-any-return]

    def train_step(step: int, draws: Draws) -> Mapping[str, float]:
        if step == die_at:
            raise KeyboardInterrupt
        sign = -1.0 if step >= hot_from else 1.0
        return role.update(draws, lambda draws: error(draws.normal(3)) * sign)

    def look(step: int) -> Mapping[str, float]:
        with torch.no_grad():
            return {"loss": float(error(fixed))}

    seen = Watch(given, name="test", evaluate=look, held_out="loss")
    return loop.train(train_step, [role], engine=engine_of(given), name="test", steps=steps, batch=4, watch=seen)


def test_rollback_ends_with_the_weights_of_the_best_look(tmp_path: Path) -> None:
    good, bad = trained(tmp_path / "good"), trained(tmp_path / "bad")
    assert descend(good, tmp_path / "good", 6) == 6
    assert descend(bad, tmp_path / "bad", 200, hot_from=7, on_breach="rollback", max_worsening=0.1) == 6
    for key, value in good.full_state().items():
        assert torch.equal(value, bad.full_state()[key])
    (breach,) = [json.loads(line) for line in (tmp_path / "bad" / BREACHES_FILE).read_text().splitlines()]
    assert (breach["action"], breach["best_step"], breach["figure"]) == ("rollback", 6, "loss")
    assert breach["value"] > breach["high"]


@pytest.mark.parametrize("die_at", [1, 5, 6, 7, 9, 11])
def test_a_killed_training_rolls_back_to_the_same_weights(die_at: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hot_from": 7, "on_breach": "rollback", "max_worsening": 0.5}
    whole = trained(tmp_path / "whole")
    ended = descend(whole, tmp_path / "whole", 40, **settings)
    with pytest.raises(KeyboardInterrupt):
        descend(trained(tmp_path / "broken"), tmp_path / "broken", 40, die_at=die_at, **settings)
    again = trained(tmp_path / "broken")
    assert descend(again, tmp_path / "broken", 40, **settings) == ended
    for key, value in whole.full_state().items():
        assert torch.equal(value, again.full_state()[key])
    for name in ("metrics.jsonl", BREACHES_FILE):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()


def test_stop_keeps_the_last_good_checkpoint_and_another_limit_goes_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"test: step 12: loss .*max_worsening"):
        descend(trained(tmp_path), tmp_path, 20, hot_from=7, max_worsening=0.5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best-00000006", "step-00000010", "step-00000011",
    ]  # fmt: skip
    again, unbroken = trained(tmp_path), trained(tmp_path / "unbroken")
    assert descend(again, tmp_path, 20, hot_from=7, max_worsening=None) == 20
    assert descend(unbroken, tmp_path / "unbroken", 20, hot_from=7, max_worsening=None) == 20
    for key, value in unbroken.full_state().items():
        assert torch.equal(value, again.full_state()[key])


def test_rollback_without_a_good_look_stops(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="stopped: no evaluation was better than the start"):
        descend(trained(tmp_path), tmp_path, 40, hot_from=1, on_breach="rollback", max_worsening=0.1)


def test_a_damaged_best_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        descend(trained(tmp_path), tmp_path, 40, hot_from=7, die_at=8, on_breach="rollback", max_worsening=0.1)
    (tmp_path / "checkpoints/best-00000006/rank-0.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match="the best evaluation's checkpoint is gone or damaged; start this again"):
        descend(trained(tmp_path), tmp_path, 40, hot_from=7, on_breach="rollback", max_worsening=0.1)
