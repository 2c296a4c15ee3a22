"""Processes that cannot meet, or lose each other, end with one line whatever torch's error says."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.rendezvous

from flcompress.core.wandb_access import wandb_error
from flcompress.distributed.launch import Launch, join, repeatable
from flcompress.distributed.world import World
from flcompress.errors import RequestError, TrainingError, first_line


@pytest.mark.parametrize(
    ("message", "line"), [("", "DistNetworkError"), (" \n", "DistNetworkError"), ("gone\nat x.cpp", "gone")]
)
def test_the_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(dist.DistNetworkError(message)) == line


def test_processes_that_cannot_meet_for_no_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise dist.DistNetworkError("")

    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous", fail)
    with (
        pytest.raises(RequestError, match=r"within 5 s \(training\.timeout\): DistNetworkError; start all"),
        join("ddp", 5.0, "cpu", Launch(0, 2)),
    ):
        pass


class Silent:
    """The watch of a world whose store is gone."""

    period = 0.0

    def lives(self) -> list[tuple[int, str]]:
        raise RuntimeError


def test_a_lost_peer_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 2)
    monkeypatch.setattr(world, "_watch", Silent())
    monkeypatch.setattr("flcompress.distributed.world._EXCHANGE_WORDS", ("",))
    with pytest.raises(TrainingError, match=r"lost the one that all meet at: .* \(RuntimeError\)"), world.exchanging():
        raise RuntimeError


def test_a_wandb_error_without_a_message() -> None:
    assert "it cannot be used: RuntimeError;" in str(wandb_error(RuntimeError()))


def test_repeatable_sums_last_as_long_as_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def flags() -> tuple[bool, bool, bool]:
        filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, filling

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with repeatable(enabled=False):
        assert flags() == before
    with repeatable(enabled=True):
        assert flags() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1, r"environment: LOCAL_RANK=1 given, but this machine has 1 GPUs; start one process for each"),
        (2, r"training.engine: ddp exchanges tensors between GPUs by NCCL, which torch .* was built without; install"),
    ],
)
def test_gpus_that_cannot_be_used_together(gpus: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(RequestError, match=f"^{message}"), join("ddp", 5.0, "cuda", Launch(1, 2, 1)):
        pass
