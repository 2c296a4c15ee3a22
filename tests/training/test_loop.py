from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flcompress.core.program import Program
from flcompress.core.settings import AttentionName, Health
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.draws import Draws
from flcompress.errors import TrainingError
from flcompress.training import checkpoint, loop
from flcompress.training.engines import Engine, Hyper, engine_of, replicated
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import Watch
from tests.fixtures.rounding import rounding
from tests.training.comparing import LastDropped, ShareForgotten, smooth
from tests.training.processes import Hook


def silent(done: int, total: int, values: Mapping[str, float]) -> None:
    pass


def no_data(program: Program) -> LatentDataset:
    raise AssertionError("nothing here reads data")


def engine(folder: Path = Path(), checkpoint_seconds: float = 60.0, micro_batch: int | None = None) -> Engine:
    work = PassContext(
        directory=folder,
        seed=0,
        data=no_data,
        progress=silent,
        checkpoint_seconds=checkpoint_seconds,
        health=Health(every=4),
        micro_batch=micro_batch,
    )
    return engine_of(work)


def role(micro_batch: int | None = None) -> TrainedRole:
    torch.manual_seed(0)
    sharing, hyper = engine(micro_batch=micro_batch), Hyper(learning_rate=0.1)
    return TrainedRole(sharing, "model", nn.Linear(3, 1), batch=8, hyper=hyper, ema_decay=0.9)


def held_out(step: int) -> dict[str, float]:
    return {"held_out": 1.0 / (1.0 + step)}


def run(trained: TrainedRole, folder: Path, steps: int, fail_at: int | None = None, *, seconds: float = 0.0) -> None:
    def train_step(step: int, draws: Draws) -> Mapping[str, float]:
        if step == fail_at:
            raise KeyboardInterrupt
        return trained.update(draws, loss)

    def loss(draws: Draws) -> torch.Tensor:
        x = draws.normal(3)
        error: torch.Tensor = (trained.module(x) - x.sum(1, keepdim=True)).square().mean()
        return error

    sharing = engine(folder, seconds)
    watch = Watch(
        sharing.context, name="test", evaluate=lambda step: {"held_out": 1.0 / (1.0 + step)}, held_out="held_out"
    )
    loop.train(train_step, [trained], engine=sharing, name="test", steps=steps, batch=8, watch=watch)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path, micro_batch: int | None) -> None:
    whole = role(micro_batch)
    run(whole, tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        run(role(micro_batch), tmp_path / "broken", 12, fail_at=8)
    again = role(micro_batch)
    run(again, tmp_path / "broken", 12)
    for key, value in whole.averaged_state().items():
        assert torch.equal(value, again.averaged_state()[key])
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "broken/metrics.jsonl").read_text()


def apart(folder: Path, micro_batch: int) -> tuple[float, float]:
    """(figures, weights): how far five steps in micro batches are from five at once; weights relative to their way."""
    start, whole, parts = role().full_state(), role(), role(micro_batch)
    run(whole, folder / "whole", 5)
    run(parts, folder / "parts", 5)
    assert parts.updates == whole.updates == 5
    lines = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    logged = [[value for line in log for value in json.loads(line).values()] for log in lines]
    reached, found = whole.averaged_state(), parts.averaged_state()
    return (
        max(abs(other - one) / max(abs(one), 1.0) for one, other in zip(*logged, strict=True)),
        max(float((found[key] - reached[key]).norm() / (reached[key] - start[key]).norm()) for key in start),
    )


ROUNDED = rounding(5 * 2 * 100)
"""What five steps may differ by: a prediction is a sum of 4, a loss one of 8, and a gradient of 8 more; with the norm,
the step and its moving average fewer than 100 operations, in both."""


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7])
def test_micro_batches_add_up_to_the_batch(tmp_path: Path, micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicated, "optimiser", smooth)
    assert max(apart(tmp_path, micro_batch)) < ROUNDED


@pytest.mark.parametrize("fault", [ShareForgotten(), LastDropped()], ids=["share", "last"])
def test_micro_batches_that_add_up_to_something_else_would_be_found(
    tmp_path: Path, fault: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicated, "optimiser", smooth)
    monkeypatch.setattr(
        TrainedRole, "_backward", TrainedRole._backward
    )  # so that what the fault puts there is taken back
    fault()
    assert min(apart(tmp_path, 3)) > 100 * ROUNDED


@pytest.mark.parametrize("micro_batch", [8, 9, 1000])
def test_micro_batches_as_large_as_the_batch_are_the_batch(tmp_path: Path, micro_batch: int) -> None:
    run(role(), tmp_path / "whole", 5)
    run(role(micro_batch), tmp_path / "parts", 5)
    assert (tmp_path / "parts/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_micro_batch_that_is_not_finite_stops_before_the_step() -> None:
    """The others are; nothing of them stays."""
    trained = role(4)
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}

    def loss(draws: Draws) -> torch.Tensor:
        first = draws.mine.start == 0
        error: torch.Tensor = trained.model(draws.normal(3)).square().mean() * (float("nan") if first else 1.0)
        return error

    with pytest.raises(TrainingError, match=r"model: the loss is nan at update 1; expected a finite number"):
        trained.update(Draws("bad", batch=8), loss)
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in trained.model.parameters())


def test_a_log_line_cut_in_half_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(role(), tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "los')
    run(role(), tmp_path, 4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 4, 4]  # what is held out is looked at before the first, every fourth, and last


def test_what_was_looked_at_before_the_first_checkpoint_is_logged_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(role(), tmp_path, 4, fail_at=3, seconds=1e9)
    run(role(), tmp_path, 4)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()].count(0) == 1


@pytest.mark.parametrize(("attention", "allowed"), [("native", False), ("cudnn", True)])
def test_no_gradient_comes_from_the_attention_of_cudnn_unasked(
    tmp_path: Path, attention: AttentionName, *, allowed: bool
) -> None:
    """In torch's own choice; its backward can be wrong on Hopper (docs/decisions/0019-first-day-on-a-gpu.md)."""
    sharing = engine(tmp_path)
    sharing.context = replace(sharing.context, attention=attention)
    seen: list[bool] = []

    def train_step(step: int, draws: Draws) -> Mapping[str, float]:
        seen.append(chosen())
        return {}

    chosen: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled
    assert chosen()
    loop.train(train_step, [], engine=sharing, name="t", steps=2, batch=1)
    assert seen == [allowed, allowed]
    assert chosen()


def test_checkpoints_come_as_often_as_asked(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(role(), tmp_path / "seldom", 9, fail_at=8, seconds=1e9)
    assert not list((tmp_path / "seldom/checkpoints").glob("step-*"))
    with pytest.raises(KeyboardInterrupt):
        run(role(), tmp_path / "always", 9, fail_at=8, seconds=0.0)
    assert sorted(path.name for path in (tmp_path / "always/checkpoints").glob("step-*")) == [
        "step-00000006",
        "step-00000007",
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(bad: float) -> None:
    trained = role()
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"model: the loss is (nan|-?inf) at update 1; expected a finite number"):
        trained.update(Draws("bad", batch=1), lambda draws: trained.model(torch.ones(1, 3)).sum() * bad)
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    trained = role()
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    zero = trained.model(torch.ones(1, 3)).sum() * 0.0
    with pytest.raises(TrainingError, match="model: the gradient norm is nan"):
        trained.update(Draws("bad", batch=1), lambda draws: torch.sqrt(zero.abs()))
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in trained.model.parameters())


@pytest.mark.parametrize(("setting", "took", "interval"), [(60.0, 1.0, 60.0), (60.0, 9.0, 180.0), (0.0, 9.0, 0.0)])
def test_checkpoints_take_a_twentieth_of_the_time_at_most(
    setting: float, took: float, interval: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the recipe wants one after every step."""
    now = 0.0

    def save(self: object, step: int, *more: object) -> None:
        nonlocal now
        now += took

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bookkeeping = loop._Run(lambda step, draws: {}, [], engine(tmp_path, setting), "test", 8, None)
    assert bookkeeping.checkpoint_interval == setting
    bookkeeping.save(1, wait=True)
    assert bookkeeping.checkpoint_interval == interval
