"""Checkpoints that are written while the training continues: those of their step, whole or not there, one at a time."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.files import sha256
from flcompress.training import checkpoint, loop
from flcompress.training.background import Background
from flcompress.training.checkpoint import Checkpoints
from flcompress.training.engines import Hyper
from flcompress.training.engines.replicated import Local
from flcompress.training.parts import Part, write_parts
from flcompress.training.role import TrainedRole
from tests.fixtures.gaussian import work_in
from tests.training.faulty import met, resumed, steps
from tests.training.home import Home

FILE = "rank-0.safetensors"


class Writer:
    """Writes only when it may.

    Attributes:
        may: set while it may.
        done: released after each file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.done = threading.Event(), threading.Semaphore(0)
        self.may.set()
        monkeypatch.setattr(checkpoint, "write_parts", self.write)

    def write(self, *given: Any, **more: Any) -> str | None:
        assert self.may.wait(60)
        digest = write_parts(*given, **more)
        self.done.release()
        return digest


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    writer = Writer(monkeypatch)
    yield writer
    writer.may.set()


def train(folder: Path, last: int, *, background: bool, writer: Writer | None = None) -> TrainedRole:
    """A training that checkpoints every step; the writer, if given, does not write in steps 2 and 3."""
    torch.manual_seed(0)
    work = replace(work_in(folder), background_checkpoints=background, checkpoint_seconds=0.0)
    engine = Local(work)
    role = TrainedRole(engine, "model", nn.Linear(3, 2), batch=2, hyper=Hyper(learning_rate=0.1), ema_decay=0.9)

    def step(number: int, draws: Draws) -> Mapping[str, float]:
        if writer is not None and number == 2:
            assert writer.done.acquire(timeout=60)
            writer.may.clear()
        if writer is not None and number == 3:
            assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-00000001"]
            threading.Timer(0.2, writer.may.set).start()
        return role.update(draws, lambda draws: role.module(draws.normal(3)).square().mean())

    loop.train(step, [role], engine=engine, name="test", steps=last, batch=2)
    return role


def test_it_is_the_checkpoint_of_its_step(tmp_path: Path, writer: Writer) -> None:
    """Whatever the training does to the weights while it is written; and the training is the same."""
    plain = train(tmp_path / "plain", 3, background=False)
    trained = train(tmp_path / "background", 3, background=True, writer=writer)
    for name in ("step-00000002", "step-00000003"):
        digests = {sha256(tmp_path / kind / "checkpoints" / name / FILE) for kind in ("plain", "background")}
        assert len(digests) == 1, name
    assert torch.equal(trained.model.weight, plain.model.weight)
    assert not list(tmp_path.rglob(".work-*"))
    logs = [(tmp_path / kind / "metrics.jsonl").read_text() for kind in ("plain", "background")]
    assert logs[0] == logs[1]


def stored(folder: Path) -> tuple[Checkpoints, Background, torch.Tensor]:
    """A checkpoint of step 1, in place."""
    store = Checkpoints(folder, World(), "local", print)
    weight = torch.ones(3)
    store.save(1, {"weight": Part(weight)})
    return store, Background(store), weight


def test_what_is_not_finished_leaves_the_one_before(tmp_path: Path, writer: Writer) -> None:
    store, background, weight = stored(tmp_path)
    writer.may.clear()
    background.begin(2, {"weight": Part(weight)})
    assert len(list(tmp_path.glob("checkpoints/.work-*"))) == 1
    assert store.load()[0] == 1  # as after a kill
    assert not list(tmp_path.glob("checkpoints/.work-*"))


def test_one_is_written_at_a_time(tmp_path: Path, writer: Writer) -> None:
    store, background, weight = stored(tmp_path)
    assert not background.written
    writer.may.clear()
    background.begin(2, {"weight": Part(weight)})
    assert not background.written
    threading.Timer(0.2, writer.may.set).start()
    background.begin(3, {"weight": Part(weight.add_(1.0))})  # waits
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == ["step-00000001", "step-00000002"]
    background.finish()
    background.finish()  # nothing is left to do
    for step, value in ((3, 2.0), (2, 1.0)):
        found, parts = store.load()
        assert found == step
        assert parts is not None
        parts.fill("weight", Part(read := torch.zeros(3)))
        assert read.tolist() == [value] * 3
        (tmp_path / f"checkpoints/step-{step:08d}").rename(tmp_path / f"seen-{step}")


def test_a_failure_ends_the_training_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, background, weight = stored(tmp_path)

    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flcompress.training.parts.write_file", full)
    background.begin(2, {"weight": Part(weight)})
    with pytest.raises(OSError, match="No space left"):
        background.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert store.load()[0] == 1


@pytest.mark.slow
def test_two_processes_finish_together(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    ended = met(home, folder, "exit:1:5", "ddp", "training.background_checkpoints=true")
    assert [process.exitcode for process in ended.processes] == [1, 7]
    assert set(steps(folder)) & {"step-00000002", "step-00000003", "step-00000004"}
    assert resumed(home, folder) == whole
