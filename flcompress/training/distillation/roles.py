"""The roles of distribution matching and the step that updates them; the pass itself is in passes/dmd.py."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion import matching
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, to_device
from flcompress.draws import Draws, seed_of
from flcompress.models.loading import meta_transformer
from flcompress.models.network import as_network
from flcompress.training.distillation.discriminator import NEAR, Adversary, Grids, TeacherFeatures
from flcompress.training.distillation.guided_teacher import GuidedTeacher, Scales
from flcompress.training.distillation.settings import DistillationSettings
from flcompress.training.distillation.simulation import Simulation, Start
from flcompress.training.distillation.student_monitor import StudentEvaluation
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.objectives import denoising_loss, draw_levels, level_range
from flcompress.training.role import Loss, TrainedRole
from flcompress.training.shared_base import LoRA, SharedBase, unadapted


class Roles:
    """Generator, fake score, guided teacher and, with the adversarial term, discriminator of one distillation.

    Attributes:
        engine: trains them.
        generator: becomes the student.
        trained: the generator, the fake score, and the discriminator if there is one.
        teacher: the real score's model.
        health: the held-out evaluations; None if the recipe wants no samples.
        feed: the inputs of all updates.
    """

    def __init__(
        self, settings: DistillationSettings, program: Program, contract: SamplingContract, engine: Engine
    ) -> None:
        context, parts = engine.context, program.components
        self.engine, self._settings, self._device = engine, settings, context.device
        self._heartbeat = context.world.heartbeat
        self._process, self._shift = contract.process, program.teacher_contract.shift
        self._embedded = contract.embedded_guidance
        self._data, fixed = _split(context.data(program), context.health.samples)
        negative = to_device(self._data.negative, context.device)
        low, high = settings.score_range
        self._score_range = level_range(contract, self._shift, low=low, high=high, key="dmd.score_range")

        real_score = parts[settings.real_score]
        self._graph = engine.graph(real_score)
        base = self._build_base(real_score) if settings.shares else None
        self.teacher = base.model if base is not None else engine.load_frozen(real_score)
        if settings.gan_weight and base is None:
            engine.checkpoint_blocks(self.teacher)  # the generator's gradient runs through it
        real = as_network(engine.wrap_frozen(self.teacher), self._embedded)
        student = self._build_student(program, base)
        self.generator = TrainedRole.of(engine, "generator", student, settings.optimisation)
        self._generator = as_network(self.generator.module, self._embedded)
        self._critic = self._build_critic(program, base)
        self._fake = as_network(self._critic.module, self._embedded)
        self.trained: tuple[TrainedRole, ...] = (self.generator, self._critic)
        self._adversary: Adversary | None = None
        self._met: list[tuple[torch.Tensor, torch.Tensor, Conditioning]] = []
        watched: Network | None = None
        if settings.gan_weight:
            features = TeacherFeatures(self.teacher, real, self._graph, context.world.sequence)
            self._adversary = Adversary(engine, settings, features)
            self.trained += (self._adversary.role,)
            watched = self._adversary.predict
        self._teacher = GuidedTeacher(
            engine,
            self.teacher,
            self._leaning if settings.real_lean else real,
            self._graph,
            program.prune_set,
            inter_cfg=settings.inter_cfg,
            intra_cfg=settings.intra_cfg,
            negative=negative,
            conditional=None if settings.real_lean else watched,
        )

        partner, sampled, guided = None, self._generator, real
        # A low-noise expert starts where its partner ends; what comes after a high-noise one matters to samples only.
        if (experts := contract.experts) is not None and (experts.compressed == "low" or fixed is not None):
            partner = teacher_partner = self._load_partner(parts["partner"])
            if fixed is not None and parts["original_partner"] != parts["partner"]:
                teacher_partner = self._load_partner(parts["original_partner"])
            sampled, guided = experts.combine(sampled, partner), experts.combine(guided, teacher_partner)
        self._simulation = Simulation(program, contract, self._data, negative, context.device, partner, self._heartbeat)
        critic = [self._read_samples, *([self._read_clips] if self._adversary is not None else [])]
        self.feed = Feed(context, *(critic * settings.critic_updates), self._read_guided)
        self.health: StudentEvaluation | None = None
        if fixed is not None:
            self.health = StudentEvaluation(
                context,
                program,
                contract,
                fixed,
                batch=settings.optimisation.batch,
                generator=self.generator,
                student=sampled,
                fake=self._fake,
                real=guided,
                score_range=self._score_range,
            )

    def _load_partner(self, folder: Path) -> Network:
        """Load the expert that is not compressed."""
        return as_network(self.engine.wrap_frozen(self.engine.load_frozen(folder)), self._embedded)

    def _build_base(self, folder: Path) -> SharedBase:
        """Load a frozen transformer for LoRAs to share."""
        blocks = [block.path for block in self.engine.graph(folder).blocks]
        unsharded = unadapted(meta_transformer(folder), blocks)
        base = SharedBase(self.engine.load_frozen(folder, unsharded=unsharded), blocks)
        self.engine.checkpoint_blocks(base.model, base.checkpoint)
        return base

    def _build_student(self, program: Program, base: SharedBase | None) -> Any:
        """Load the pruned transformer, or build a LoRA that computes like it."""
        engine, settings, graph = self.engine, self._settings, self._graph
        folder, seed = program.components["transformer"], seed_of(engine.context.seed, "generator")
        if settings.generator == "full":
            return engine.load_trained(folder)
        if base is None or not settings.generator_shares:
            own = self._build_base(folder)
            return LoRA(own, own.blocks, settings.lora_rank, seed=seed)
        remaining = program.kept.values()
        gone = [block.path for block in graph.blocks if block.path not in remaining]

        def skipping() -> AbstractContextManager[None]:
            return engine.skip(self.teacher, gone, graph=graph)

        return LoRA(base, remaining, settings.lora_rank, seed=seed, forward_context=skipping)

    def _build_critic(self, program: Program, base: SharedBase | None) -> TrainedRole:
        """Load the fake score, or build it as a LoRA on the real score's weights."""
        settings = self._settings
        if settings.fake_score == "lora" and base is not None:
            seed = seed_of(self.engine.context.seed, "fake score")
            fake: Any = LoRA(base, base.blocks, settings.lora_rank, seed=seed)
        else:
            fake = self.engine.load_trained(program.components["elastic"])
        return TrainedRole.of(
            self.engine,
            "fake_score",
            fake,
            settings.optimisation,
            learning_rate=settings.critic_learning_rate,
            ema_decay=0.0,
            updates=settings.critic_updates,
        )

    def _leaning(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict as the real score that leans towards the fake one (Shao et al. 2025, MagicDistillation)."""
        with self._critic.model.leaning(self._settings.real_lean):
            return self._fake(x, timestep, conditioning)

    def step(self, step: int, draws: Draws) -> Mapping[str, float]:
        """Take the critic's updates, then one of the generator's (two-time-scale rule)."""
        values: dict[str, float] = {}
        for _ in range(self._settings.critic_updates):
            values |= self.update_critic(draws)
        return values | self.update_generator(draws)

    def update_critic(self, draws: Draws) -> dict[str, float]:
        """Take one step of the fake score, and one of the discriminator on the same samples."""
        figures = self._critic.update(draws, self._critic_loss)
        if self._adversary is None:
            return figures
        return figures | self._adversary.role.update(draws, self._discriminator_loss)

    def update_generator(self, draws: Draws) -> dict[str, float]:
        """Take one step of the generator."""
        return self.generator.update(draws, self._generator_loss)

    def _draw_noise(self, x: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (s, noise shaped as x) at levels drawn from the score range and shifted."""
        low, high = self._score_range
        return draw_levels(draws, self._shift, low=low, high=high), draws.normal(*x.shape[1:])

    def _read_samples(self, draws: Draws) -> tuple[Start, torch.Tensor, torch.Tensor]:
        """Return (the start of the samples, the levels to judge them at, noise)."""
        start = self._simulation.draw(draws)
        return start, *self._draw_noise(start.noise, draws)

    def _critic_loss(self, draws: Draws) -> torch.Tensor:
        start, level, noise = self.feed.take(self._read_samples, draws)
        x, conditioning = self._simulation.sample(self._generator, start, grad=False), start.conditioning
        if self._adversary is not None:
            noised = self._process.add_noise(x, noise, level)
            self._met.append((noised, self._process.timestep(level), conditioning))
        return denoising_loss(self._fake, self._process, x, conditioning, level, noise)

    def _read_clips(
        self, draws: Draws
    ) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (real clips, their conditioning, levels, noise, noise that leads to near clips if they are needed)."""
        clips, conditioning = self._data.batch(draws.batch, draws.shared, draws.mine)
        level, noise = self._draw_noise(clips, draws)
        nudge = NEAR * draws.normal(*clips.shape[1:]) if self._settings.gan_r1 else None
        return clips, conditioning, level, noise, nudge

    def _discriminator_loss(self, draws: Draws) -> Loss:
        assert self._adversary is not None
        clips, conditioning, level, noise, nudge = self.feed.take(self._read_clips, draws)
        generated = self._features(*self._met.pop(0))
        noised, timestep = self._process.add_noise(clips, noise, level), self._process.timestep(level)
        real, near = self._features(noised, timestep, conditioning), None
        if nudge is not None:
            near = self._features(noised + nudge, timestep, conditioning)
        loss, figures = self._adversary.critic_loss(generated, real, near)
        return Loss(value=loss, figures=figures)

    def _features(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> Grids:
        assert self._adversary is not None
        self._heartbeat()
        return self._adversary.features(x, timestep, conditioning)

    def _read_guided(self, draws: Draws) -> tuple[Start, torch.Tensor, torch.Tensor, Scales]:
        """Return (the start of the samples, the levels to judge them at, noise, the teacher's scales of guidance)."""
        return *self._read_samples(draws), self._teacher.draw(draws)

    def _generator_loss(self, draws: Draws) -> Loss:
        start, level, noise, scales = self.feed.take(self._read_guided, draws)
        x, conditioning = self._simulation.sample(self._generator, start, grad=True), start.conditioning
        noised, timestep = self._process.add_noise(x, noise, level), self._process.timestep(level)
        met = noised.detach().requires_grad_(self._adversary is not None)
        with torch.no_grad():
            fake = self._process.tweedie(met, self._fake(met, timestep, conditioning), level)
            self._heartbeat()
            real = self._process.tweedie(met, self._teacher(met, timestep, conditioning, scales), level)
            self._heartbeat()
            g = matching.gradient(x, fake, real)
        loss = matching.loss(x, g)
        if self._adversary is not None:
            if self._settings.real_lean:  # then no forward of the guidance is the frozen teacher's
                self._adversary.predict(met, timestep, conditioning)
            loss = loss + self._adversary.generator_loss(noised, met, self.generator.updates)
        x = x.detach()
        figures = {"score_gap": (fake - real).abs().mean(), "generated_std": x.flatten(1).std(dim=1).mean()}
        if x.shape[2] > 1:  # an image has no motion: the mean of nothing is not a number
            figures["generated_motion"] = x.diff(dim=2).abs().mean()
        return Loss(value=loss, figures=figures, per_sample={"normaliser": matching.normaliser(x, real)})


def held_out_of(clips: int, samples: int) -> int:
    """Return how many of the last clips of a dataset the training leaves to its fixed samples."""
    return min(samples, max(1, clips // 4))


def _split(data: LatentDataset, samples: int) -> tuple[LatentDataset, LatentDataset | None]:
    """Return (training data, data of the fixed samples); a dataset of prompts alone serves both."""
    if not samples:
        return data, None
    return (data, data) if data.prompts_only else data.split(held_out_of(len(data), samples))
