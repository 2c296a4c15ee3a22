"""Train a student that maps every point of the teacher's path to the path's clean end (Luo et al. 2023, LCM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Program
from flcompress.core.settings import Range
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, select, to_device, with_negative_prompt
from flcompress.diffusion.process import shift
from flcompress.diffusion.sampling import guide
from flcompress.draws import Draws
from flcompress.models.families.shared import GUIDANCE
from flcompress.models.network import as_network
from flcompress.training.distillation.roles import held_out_of
from flcompress.training.distillation.student_monitor import StudentEvaluation, student_watch
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.loop import train
from flcompress.training.objectives import draw_levels
from flcompress.training.role import TrainedRole

HUBER = 1e-3
"""h: below it the loss is quadratic, above it linear."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining:
    """The training of the `consistency` pass; the attributes are the pass's arguments."""

    name: str
    optimisation: Optimisation
    levels: int
    skip: int
    guidance: float | None
    embedded_guidance: Range | None

    def weights(
        self, engine: Engine, program: Program, contract: SamplingContract
    ) -> tuple[int, dict[str, torch.Tensor]]:
        """Train; return the step whose weights these are, and the weights, in the main process alone.

        Args:
            engine: trains the student.
            program: its transformer becomes the student, and its original is the teacher.
            contract: the student's.
        """
        roles = ConsistencyRoles(self, program, contract, engine)
        steps = train(
            lambda step, draws: roles.update(draws),
            [roles.student],
            engine=engine,
            name=self.name,
            steps=self.optimisation.steps,
            batch=self.optimisation.batch,
            watch=student_watch(engine.context, self.name, roles.health, guidance="guidance"),
            feed=roles.feed,
        )
        return steps, roles.student.averaged_state()


class ConsistencyRoles:
    """The student and its frozen teacher.

    Attributes:
        student: the trained transformer; the average of its weights is the target.
        feed: the inputs of its updates.
        health: the held-out evaluations; None if the recipe wants no samples.
    """

    def __init__(
        self, settings: ConsistencyTraining, program: Program, contract: SamplingContract, engine: Engine
    ) -> None:
        context, teacher = engine.context, program.teacher_contract
        self._settings, self._context, self._process = settings, context, contract.process
        self._scale = teacher.guidance_scale if settings.guidance is None else settings.guidance
        self._grid = grid(settings.levels, teacher.shift)
        data, samples = context.data(program), context.health.samples
        self._data, fixed = data.split(held_out_of(len(data), samples)) if samples else (data, None)
        self._negative = to_device(data.negative, context.device)
        embedded = contract.embedded_guidance
        original = engine.wrap_frozen(engine.load_frozen(program.components["original"]))
        self._teacher = as_network(original, embedded)
        model = engine.load_trained(program.components["transformer"])
        self.student = TrainedRole.of(engine, "student", model, settings.optimisation)
        self._network = as_network(self.student.module, embedded)
        self.feed = Feed(context, self._read)
        self.health: StudentEvaluation | None = None
        if fixed is not None:
            self.health = StudentEvaluation(
                context,
                program,
                contract,
                fixed,
                batch=settings.optimisation.batch,
                generator=self.student,
                student=self._network,
                real=self._teacher,
            )

    def update(self, draws: Draws) -> dict[str, float]:
        """Take one optimiser step."""
        return self.student.update(draws, self._loss)

    def _read(self, draws: Draws) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor, list[int]]:
        """Return (clips, conditioning, noise, levels s [n], which of the grid these are)."""
        x0, conditioning = self._data.batch(draws.batch, draws.shared, draws.mine)
        if self._settings.embedded_guidance is not None:
            low, high = self._settings.embedded_guidance
            conditioning = {**conditioning, GUIDANCE: low + (high - low) * draws.uniform()}
        noise, start = draws.normal(*x0.shape[1:]), self._draw_starts(draws)
        return x0, conditioning, noise, self._grid[start], start.tolist()

    def _loss(self, draws: Draws) -> torch.Tensor:
        """L = huber(f(x_s, s) - f_ema(x_s', s'))."""
        process = self._process
        x0, conditioning, noise, level, start = self.feed.take(self._read, draws)
        x = process.add_noise(x0, noise, level)
        target = self._target(x, conditioning, level, torch.tensor(start))
        prediction = self._network(x, process.timestep(level), conditioning)
        return huber(process.consistency(x, prediction.float(), level) - target)

    def _draw_starts(self, draws: Draws) -> torch.Tensor:
        """Draw where in the grid the teacher's steps start, [n]: uniform in 0 .. N - k, in strata."""
        last = self._settings.levels - self._settings.skip
        return (draw_levels(draws, 1.0) * (last + 1)).long().clamp(max=last)

    @torch.no_grad()
    def _target(
        self, x: torch.Tensor, conditioning: Conditioning, level: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Return f_ema(x_s', s'), with x_s' one step of the guided teacher's ODE from x_s; x_s' itself where s' = 0.

        Before the student's own forward: the average takes the place of the weights, which its backward needs.

        Args:
            x: x_s [n, channels, frames, height, width].
            conditioning: its conditioning.
            level: s [n].
            start: which levels of the grid these are, [n], in host memory.
        """
        process, world, device = self._process, self._context.world, x.device
        following = start + self._settings.skip
        end = self._grid[following].to(device, non_blocking=True)
        guided = self._guided(x, process.timestep(level), conditioning)
        world.heartbeat()
        target = process.step(x, guided.float(), level, end)
        # Several processes must make the same calls; f(x, 0) = x then discards those at the end of the path.
        called = following < self._settings.levels if world.size == 1 else torch.ones_like(following, dtype=torch.bool)
        chosen = torch.arange(len(x))[called]
        part = chosen.to(device, non_blocking=True)
        with self.student.with_average():
            if len(part):
                here, s = target[part], end[part]
                prediction = self._network(here, process.timestep(s), select(conditioning, chosen))
                target[part] = process.consistency(here, prediction.float(), s)
        world.heartbeat()
        return target

    def _guided(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the teacher's prediction u + w (c - u): a step is affine in it, so guiding either is the same."""
        conditional = self._teacher(x, timestep, conditioning)
        if self._scale == 1.0:
            return conditional
        unconditional = self._teacher(x, timestep, with_negative_prompt(conditioning, self._negative))
        return guide(unconditional, conditional, self._scale)


def grid(levels: int, by: float) -> torch.Tensor:
    """Return N + 1 noise levels 1 = g_0 > .. > g_N = 0, evenly spaced and then shifted."""
    return shift(torch.linspace(1.0, 0.0, levels + 1, dtype=torch.float64), by).float()


def huber(difference: torch.Tensor) -> torch.Tensor:
    """Return the mean of sqrt(d^2 + h^2) - h, in a form that does not cancel where d is small."""
    square = difference.square()
    return (square / ((square + HUBER**2).sqrt() + HUBER)).mean()
