"""Sums over more than two processes: a training that is taken up adds in the order of one that was not interrupted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import override

from flcompress.core.steps import PassContext
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.role import TrainedRole
from tests.training.comparing import Smooth
from tests.training.processes import run

pytestmark = pytest.mark.slow

PROCESSES, STEPS, WIDTH = 3, 4, 40


class Network(nn.Module):
    """Layers that are called in another order than they are listed in, so that gradients come in a third one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (2, 0, 3, 1):
            x = torch.tanh(self.layers[layer](x))
        return x


@dataclass(frozen=True)
class Trainings:
    """Train once in one go and once in two, in place of a command; the main process writes the weights of both."""

    folder: Path

    def __call__(self) -> None:
        Smooth()()
        with join("ddp", 600.0, "cpu", Launch.from_environment()) as world:
            whole, first, second = Network(), Network(), Network()
            steps(whole, world, 0, STEPS)
            steps(first, world, 0, STEPS // 2)
            second.load_state_dict(first.state_dict())
            steps(second, world, STEPS // 2, STEPS)
            if world.main:
                save_file(whole.state_dict(), self.folder / "whole.safetensors")
                save_file(second.state_dict(), self.folder / "resumed.safetensors")
        raise SystemExit(0)


def steps(model: Network, world: World, start: int, stop: int) -> None:
    """With both betas 0 a step depends on its gradient alone, and the second training needs no moments."""
    needless: Any = None
    context = PassContext(directory=Path(), seed=0, data=needless, progress=needless, world=world, engine="ddp")
    hyper = Hyper(learning_rate=0.1, betas=(0.0, 0.0))
    role = TrainedRole(engine_of(context), "role", model, batch=PROCESSES, hyper=hyper)

    def loss(draws: Draws) -> torch.Tensor:
        value: torch.Tensor = role.module(draws.normal(WIDTH)).square().mean()
        return value

    for step in range(start, stop):
        role.update(Draws(step, batch=PROCESSES, rank=world.rank, processes=world.size), loss)


def test_three_processes_add_in_one_order(tmp_path: Path) -> None:
    run([], tmp_path / "output", processes=PROCESSES, hooks=dict.fromkeys(range(PROCESSES), Trainings(tmp_path)))
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
