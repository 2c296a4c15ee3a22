"""Train a cut transformer to have the features of the original: content of single frames, and motion between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Program
from flcompress.diffusion.network import Conditioning, drop_captions
from flcompress.draws import Draws, seed_of
from flcompress.errors import ModelError
from flcompress.models.network import as_network
from flcompress.tracing.boundaries import clip_blocks, clip_features
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.loop import train
from flcompress.training.methods.feature_discriminator import (
    FeatureDiscriminator,
    discriminator_term,
    student_term,
)
from flcompress.training.methods.stochastic_depth import held_out_of
from flcompress.training.objectives import draw_levels, level_range
from flcompress.training.role import Loss, TrainedRole
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutEvaluation
from flcompress.training.watching.monitor import Watch

Features = Mapping[str, torch.Tensor]
"""Path of a block -> tokens of the clip [n, tokens, channels] after it."""


@dataclass(frozen=True, kw_only=True)
class FeatureDistillTraining:
    """The training of the `feature-distill` pass; the attributes are the pass's arguments."""

    name: str
    optimisation: Optimisation
    content_weight: float
    motion_weight: float
    discriminator_learning_rate: float
    caption_dropout: float

    def weights(self, engine: Engine, program: Program) -> tuple[int, dict[str, torch.Tensor]]:
        """Train; return the step whose weights these are, and the weights, in the main process alone."""
        roles = FeatureRoles(self, program, engine)
        steps = train(
            roles.step,
            roles.trained,
            engine=engine,
            name=self.name,
            steps=self.optimisation.steps,
            batch=self.optimisation.batch,
            watch=roles.watch(),
            feed=roles.feed,
        )
        student = roles.student
        return steps, student.averaged_state() if self.optimisation.averages else student.full_state()


class FeatureRoles:
    """The cut transformer, the original whose features it learns, and the discriminator of both.

    Attributes:
        student: the trained transformer.
        discriminator: tells its features from the teacher's; None if the recipe gives it no weight.
        trained: both.
        feed: the inputs of the student's updates; the discriminator's are its features.
    """

    def __init__(self, settings: FeatureDistillTraining, program: Program, engine: Engine) -> None:
        context, contract, source = engine.context, program.contract, program.components["original"]
        self._settings, self._engine, self._context = settings, engine, context
        self._contract, self._process, self._family = contract, contract.process, program.family
        data = context.data(program)
        self._training, self._held_out = data.split(held_out_of(len(data)))
        self._low, self._high = level_range(contract, contract.shift, key=settings.name)
        self.feed = Feed(context, self._read)
        self._teacher_model = engine.load_frozen(source)
        self._teacher = as_network(engine.wrap_frozen(self._teacher_model), contract.embedded_guidance)
        model = engine.load_trained(program.components["transformer"])
        self.student = TrainedRole.of(engine, "student", model, settings.optimisation)
        self._network = as_network(self.student.module, contract.embedded_guidance)
        self._graph, self._teacher_graph = program.graph, engine.graph(source)
        paths, teacher_paths = (clip_blocks(self._family, graph) for graph in (self._graph, self._teacher_graph))
        self._kept = {path: program.kept[path] for path in paths}
        self._last, self._teacher_last = paths[-1], teacher_paths[-1]
        self._config = self.student.model.config
        self.discriminator: TrainedRole | None = None
        if settings.motion_weight:
            width = program.graph.block(self._last).streams[0].spec.shape[-1]
            self.discriminator = self._build_discriminator(width)
        self.trained = [self.student, *([self.discriminator] if self.discriminator else [])]
        self._judged: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def _build_discriminator(self, width: int) -> TrainedRole:
        settings, context = self._settings, self._context
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(context.seed, settings.name, "discriminator"))
            heads = FeatureDiscriminator(width).to(context.device)
        return TrainedRole.of(
            self._engine,
            "discriminator",
            heads,
            settings.optimisation,
            learning_rate=settings.discriminator_learning_rate,
            ema_decay=0.0,
        )

    def step(self, step: int, draws: Draws) -> Mapping[str, float]:
        """Take one step of the student, then one of the discriminator on the features of the same forwards."""
        self._judged.clear()
        figures = self.student.update(draws, self._loss)
        if self.discriminator is not None:
            figures |= self.discriminator.update(draws, self._discriminator_loss)
        return figures

    def _read(self, draws: Draws) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor]:
        """Return (clips, conditioning, noise, levels [n])."""
        x0, conditioning = self._training.batch(draws.batch, draws.shared, draws.mine)
        conditioning = drop_captions(
            conditioning, self._training.negative, draws.uniform() < self._settings.caption_dropout
        )
        noise = draws.normal(*x0.shape[1:])
        level = draw_levels(draws, self._contract.shift, low=self._low, high=self._high)
        return x0, conditioning, noise, level

    def _loss(self, draws: Draws) -> Loss:
        """L = L_task + l_icd L_icd + l_mca (-D(student))."""
        settings, process = self._settings, self._process
        x0, conditioning, noise, level = self.feed.take(self._read, draws)
        x, timestep = process.add_noise(x0, noise, level), process.timestep(level)
        wanted = dict.fromkeys([*self._kept.values(), self._teacher_last])
        with torch.no_grad(), clip_features(self._teacher_model, self._teacher_graph, wanted) as target:
            self._teacher(x, timestep, conditioning)
        self._context.world.heartbeat()
        with clip_features(self.student.model, self._graph, self._kept) as features:
            prediction = self._network(x, timestep, conditioning)
        task = (prediction.float() - process.target(x0, noise, level)).square().mean()
        content = content_loss(features, target, self._kept)
        loss, figures = task + settings.content_weight * content, {"task_loss": task, "content_loss": content}
        real, fake = self._grids(target[self._teacher_last], features[self._last], x)
        if real.shape[2] > 1:  # an image has no motion
            figures["motion_error"] = _relative(fake.diff(dim=2), real.diff(dim=2)).mean()
        if self.discriminator is not None:
            self._judged.append((real, fake.detach(), level))
            term = self._adversarial(fake, level)
            loss, figures["adversarial_loss"] = loss + settings.motion_weight * term, term
        return Loss(value=loss, figures={name: value.detach() for name, value in figures.items()})

    def _grids(
        self, teacher: torch.Tensor, student: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both denoisers' last features [n, channels, frames, rows, columns], over the teacher's mean square."""
        _, _, *size = x.shape
        grid = self._family.token_grid(self._config, (size[0], size[1], size[2]))
        if student.shape[1] != grid[0] * grid[1] * grid[2]:
            raise ModelError(
                f"feature-distill: '{self._last}' hands on {student.shape[1]} tokens, expected the clip's {grid[0]} x "
                f"{grid[1]} x {grid[2]}; this model's blocks cannot be read"
            )
        scale = teacher.float().square().mean(dim=(1, 2), keepdim=True).rsqrt()
        real, fake = ((scale * part.float()).transpose(1, 2).reshape(len(x), -1, *grid) for part in (teacher, student))
        return real, fake

    def _adversarial(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return -D(student), with its gradient in the features alone.

        The discriminator's weights are no part of the student's backward: their engine would take that for theirs.
        """
        assert self.discriminator is not None
        with torch.enable_grad():
            probe = features.detach().requires_grad_()
            value = student_term(self.discriminator.model(probe, level))
            (gradient,) = torch.autograd.grad(value, probe)
        along = (features * gradient).sum()
        return value.detach() + along - along.detach()

    def _discriminator_loss(self, draws: Draws) -> Loss:
        """Return the hinge loss on the features of the student's forward of the same micro batch."""
        assert self.discriminator is not None
        real, fake, level = self._judged.pop(0)
        logits = self.discriminator.module(torch.cat([real, fake]), torch.cat([level, level])).float()
        teacher, student = logits.chunk(2)
        return Loss(
            value=discriminator_term(teacher, student),
            figures={"teacher_logit": teacher.detach().mean(), "student_logit": student.detach().mean()},
        )

    def watch(self) -> Watch:
        """Return the watch over the student's held-out loss; the original is scored at once."""
        settings, context, engine = self._settings, self._context, self._engine
        at_once = context.at_once(settings.optimisation.batch)
        elbo = HeldOutELBO(
            self._held_out, self._contract, len(self._held_out), context.seed, context.device, at_once, context.world
        )
        with engine.forward_mode():
            reference = elbo(self._teacher)
        health = HeldOutEvaluation(elbo, {"elbo_pruned": self._network}, fixed={"elbo_original": reference})
        return Watch(
            context, name=settings.name, evaluate=health.evaluate, redraw=health.redraw, held_out="elbo_pruned"
        )


def content_loss(student: Features, teacher: Features, kept: Mapping[str, str]) -> torch.Tensor:
    """Return L_icd: the sum over boundaries of |h_student - h_teacher|^2 / |h_teacher|^2, the mean over samples.

    A boundary is what a kept block hands on, compared with what the block at its original place does, so that the next
    kept block answers for a gap. Activations grow about tenfold over depth: without the division the last would decide.

    Args:
        student: by path in the student.
        teacher: by path in the original.
        kept: path in the student -> path in the original.
    """
    return torch.stack(
        [_relative(student[path].float(), teacher[original].float()).mean() for path, original in kept.items()]
    ).sum()


def _relative(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the squared distance from a reference over the reference's square, of each sample [n]."""
    dims = tuple(range(1, values.ndim))
    return (values - reference).square().mean(dim=dims) / reference.square().mean(dim=dims).clamp(min=1e-12)
