"""Figures and strips reach TensorBoard; what is not installed is said before any work."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from torch import nn

from flcompress.core import wandb_access
from flcompress.draws import Draws
from flcompress.driver.manager import apply
from flcompress.errors import UnavailableError
from flcompress.training import loop
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import Watch
from flcompress.training.watching.strips import strip_of
from flcompress.training.watching.trackers import FOLDER, trackers
from tests.fixtures.tiny import tiny_pipeline
from tests.training.watching.test_monitor import work


def test_tensorboard_gets_every_figure_and_strip(tmp_path: Path) -> None:
    given = replace(work(tmp_path), log_to=("tensorboard",))
    role = TrainedRole(engine_of(given), "model", nn.Linear(3, 1), batch=4, hyper=Hyper(learning_rate=0.1))

    def train_step(step: int, draws: Draws) -> Mapping[str, float]:
        return role.update(draws, lambda draws: role.module(draws.normal(3)).square().mean())

    def look(step: int) -> Mapping[str, float]:
        strip_of(tmp_path, step).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 4), (step, 0, 0)).save(strip_of(tmp_path, step))
        return {"held": 1.0 / (1.0 + step)}

    seen = Watch(given, name="test", evaluate=look, held_out="held")
    loop.train(train_step, [role], engine=engine_of(given), name="test", steps=4, batch=4, watch=seen)

    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / FOLDER), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars("held")] == [
        (step, pytest.approx(1.0 / (1.0 + step))) for step in (0, 2, 4)
    ]
    assert [one.step for one in board.Scalars("model_loss")] == [1, 2, 3, 4]
    assert [(one.step, one.width, one.height) for one in board.Images("samples")] == [(n, 8, 4) for n in (0, 2, 4)]


def test_tensorboard_is_left_out_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flcompress.training.watching.trackers.find_spec", lambda name: None)
    with trackers(replace(work(tmp_path), log_to=("tensorboard",)), "test") as found:
        assert found == []
    assert not (tmp_path / FOLDER).exists()


def test_wandb_is_refused_before_any_work_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline(tmp_path / "model", layers=1)
    content = {"version": 1, "model": {"path": "model"}, "training": {"log_to": ["wandb"]}}
    (tmp_path / "logged.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(wandb_access, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError) as error:
        apply(tmp_path / "logged.yaml", tmp_path / "run")
    assert str(error.value) == (
        "training.log_to: wandb given, but Weights & Biases is not installed; pip install 'flcompress[wandb]', "
        "or leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_a_resumed_training_purges_what_tensorboard_had_after_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(work(tmp_path), log_to=("tensorboard",))
    for start, values in ((0, [(1, 1.0), (2, 2.0), (3, 3.0)]), (2, [(3, 30.0)])):
        # TensorBoard reads its files by name, which begins with the second that they were opened in.
        monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time.time", lambda at=1e9 + start: at)
        with trackers(given, "test", start) as (board,):
            for step, value in values:
                board.log(step, {"loss": value})
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / FOLDER))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
