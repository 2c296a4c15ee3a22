"""A pass that trains two small networks through the real loop, engines and checkpoints, and fails when told to.

`python -m tests.training.toy ARGUMENTS` is the command line with this pass; FLCOMPRESS_TOY_FAULT="kind:rank:step" makes
the process of that rank meet the fault in that step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from flcompress.core import registry
from flcompress.core.optimisation import Optimisation, Schedule, Warmup
from flcompress.core.program import Program
from flcompress.core.settings import Health
from flcompress.core.steps import Cost, Pass, PassContext
from flcompress.draws import Draws
from flcompress.training import parts
from flcompress.training.engines import engine_of
from flcompress.training.loop import train
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import Watch
from tests.fixtures.small_disk import fill

FAULT = "FLCOMPRESS_TOY_FAULT"


class Toy(Optimisation, Pass):
    """Train two networks against each other's output."""

    name: ClassVar[str] = "toy"
    distributed: ClassVar[bool] = True

    batch: int = Field(4, gt=0, description="samples a step")
    learning_rate: float = 1e-2
    schedule: Schedule = "cosine"
    warmup: Warmup = 3
    ema_decay: float = 0.9
    width: int = Field(16, gt=0, description="of the networks")
    reads_from: int = Field(0, ge=0, description="first step that reads clips; 0 is none")
    seconds: float = Field(0.0, ge=0, description="that a step takes")

    @property
    def needs_clips(self) -> bool:
        return self.reads_from > 0

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(steps=self.steps, batch=self.batch)

    def apply(self, program: Program, context: PassContext) -> Program:
        engine, roles = engine_of(context), []
        for place, name in enumerate(("student", "critic")):
            torch.manual_seed(place)
            layers = nn.Linear(8, self.width), nn.Linear(self.width, self.width), nn.Linear(self.width, 8)
            model = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2]).to(context.device)
            roles.append(TrainedRole.of(engine, name, model, self))
        student, critic = roles
        data = context.data(program) if self.reads_from else None

        def train_step(step: int, draws: Draws) -> Mapping[str, float]:
            broken = fault(step, context, data.folder if data else Path())
            time.sleep(self.seconds)
            if data and step >= self.reads_from:
                data.batch(draws.batch, draws.shared, draws.mine)

            def critic_loss(draws: Draws) -> torch.Tensor:
                x = draws.normal(8).to(context.device)
                with torch.no_grad():
                    target = student.module(x).cos()
                loss: torch.Tensor = (critic.module(x) - target).square().mean() * broken
                return loss

            def student_loss(draws: Draws) -> torch.Tensor:
                x = draws.normal(8).to(context.device)
                with torch.no_grad():
                    target = critic.module(x).sin() + x
                loss: torch.Tensor = (student.module(x) - target).square().mean()
                return loss

            values = critic.update(draws, critic_loss) | student.update(draws, student_loss)
            critic.clear()
            return values

        often = replace(context, health=Health(every=3))
        watch = Watch(
            often, name=self.name, evaluate=lambda step: {"held_out": 1.0 / (1.0 + step)}, held_out="held_out"
        )
        train(
            train_step,
            roles,
            engine=engine,
            name=self.name,
            steps=self.steps,
            batch=self.batch,
            watch=watch,
        )
        whole = {f"{role.name}.{key}": value for role in roles for key, value in role.full_state().items()}
        whole |= {f"average.{key}": value for key, value in student.averaged_state().items()}
        if context.world.main:
            save_file(whole, str(context.directory / "weights.safetensors"))
        return program


def fault(step: int, context: PassContext, data: Path) -> float:
    """Meet the fault that the environment names, if this is the process and the step; a factor for the loss."""
    kind, rank, when = os.environ.get(FAULT, "none:0:0").split(":")
    if int(when) != step or int(rank) != context.world.rank:
        return 1.0
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit":
        os._exit(7)
    elif kind == "exit-in-checkpoint":  # while the main process waits for what this one has written
        vars(parts)["write_file"] = lambda *given, **more: os._exit(7)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "interrupt":
        # A shell starts what runs in its background with this signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    elif kind == "error":
        raise ValueError("a mistake in the code")
    elif kind == "full":
        fill(next(one for one in context.directory.parents if one.name == "disk"))
    elif kind == "damage":
        for shard in data.glob("clips-*"):
            shard.write_bytes(bytes(shard.stat().st_size))
    elif kind == "slow":
        time.sleep(60)
    return float("nan") if kind == "nan" else 1.0


def install() -> None:
    registry.PASSES["toy"] = f"{Toy.__module__ if __name__ != '__main__' else 'tests.training.toy'}:Toy"


def backwards() -> None:
    """The wall clock runs backwards, a minute at every look, beside that the pass is known."""
    install()
    now = [2e9]

    def clock() -> float:
        now[0] -= 60.0
        return now[0]

    time.time = clock


def weights(run: Path) -> bytes:
    """The bytes of what a finished run trained."""
    (file,) = run.glob("passes/*-toy-*/weights.safetensors")
    return file.read_bytes()


if __name__ == "__main__":
    from flcompress.cli import main

    install()
    main()
