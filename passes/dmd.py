"""Stage III: distribution matching distillation with a well-guided teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field

from flcompress.data.latents import LatentDataset
from flcompress.diffusion import matching
from flcompress.diffusion.conditioning import Conditioning, on, without_prompt
from flcompress.diffusion.contract import SamplingContract, student_contract
from flcompress.diffusion.guidance import well_guided
from flcompress.diffusion.sampling import advance
from flcompress.models.network import as_network
from flcompress.pipeline.passes import Cost, Pass, Role, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.trace.network import skipping
from flcompress.training.discriminator import Discriminator, critic_term, generator_term
from flcompress.training.loop import train
from flcompress.training.objectives import denoising_loss, draw_levels
from flcompress.training.trained import Trained


def _ascending(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] > given[1]:
        raise ValueError(f"[{given[0]:g}, {given[1]:g}] given, expected [lowest, highest]")
    return given


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


class DistributionMatching(Pass):
    """Turn the transformer into a few-step generator that needs no guidance (DMD2 with FastLightGen's teacher).

    Four roles. The generator is the present, usually pruned, transformer. The fake score follows the generator's
    distribution by flow matching, several updates to each of the generator's. The real score is frozen and guides:

        x_real = u_full + b1 (c_full - u_full) + b2 (c_full - c_pruned)

    with b1 and b2 drawn from ranges for every sample. A discriminator on the fake score's features is optional.

    `- dmd: {student_steps: 4, inter_cfg: [3, 4], steps: 200}`
    """

    name: ClassVar[str] = "dmd"
    needs_data: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.FEW_STEP})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    student_steps: int = Field(4, ge=1, le=16, description="network calls of the finished generator")
    inter_cfg: Range = Field((3.0, 4.0), description="b1, text guidance, range; 1 is none (u + w (c - u))")
    intra_cfg: Range = Field(
        (0.0, 0.0),
        description="b2, guidance of the full teacher away from its pruned self, range; 0 is none "
        "(the paper's best is 0.25; on the embedded benchmark none is better, docs/benchmarks.md)",
    )
    real_score: Literal["original", "elastic"] = Field(
        "original", description="whose weights: the model the recipe started from, or what stochastic depth made of it"
    )
    critic_updates: int = Field(5, ge=1, description="updates of the fake score for each of the generator's")
    steps: int = Field(gt=0, description="updates of the generator")
    batch: int = Field(16, gt=0, description="clips an update")
    learning_rate: float = Field(2e-4, gt=0, description="of the generator")
    critic_learning_rate: float = Field(2e-4, gt=0, description="of the fake score")
    score_range: Range = Field(
        (0.02, 0.98), description="noise levels at which the scores are compared, before the shift"
    )
    ema_decay: float = Field(0.98, ge=0, lt=1, description="decay of the generator's moving average, which is kept")
    gan_weight: float = Field(0.0, ge=0, description="weight of the adversarial term; 0 is none")

    def evaluations(self, evaluations: int) -> int:
        return self.student_steps

    @property
    def needs(self) -> frozenset[Fact]:
        needed = {Fact.TRAINED}
        if self.intra_cfg != (0.0, 0.0):
            needed.add(Fact.PRUNED)
        return frozenset(needed)

    @property
    def needs_clips(self) -> bool:
        return self.gan_weight > 0

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        # The generator is pruned; the scores are as deep as the original.
        pruned = parameters / original
        simulate = pruned * (self.student_steps - 1) / 2.0
        generator = simulate + pruned * 3.0 + 1.0 + 2.0 + (pruned if self.intra_cfg != (0.0, 0.0) else 0.0)
        critic = simulate + pruned + 3.0
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (generator + self.critic_updates * critic),
            batch=self.batch,
            roles=(
                Role("generator", parameters, trained=True, averaged=True),
                Role("fake score", original, trained=True),
                Role("real score", original),
            ),
        )

    def apply(self, program: Program, work: Work) -> Program:
        data = work.data(program)
        contract = student_contract(program.teacher_contract, self.student_steps, program.family.sigmas)
        generator, fake = work.trained(program.components["transformer"]), work.trained(program.components["elastic"])
        real = work.frozen(program.components[self.real_score])
        started = time.monotonic()
        matcher = _Matcher(self, program, contract, data, generator, fake, real, work.device)
        train(
            matcher.step,
            matcher.roles,
            steps=self.steps,
            seed=(work.seed, self.name),
            directory=work.directory,
            progress=work.progress,
            precision=work.precision,
        )
        generator.load_state_dict(matcher.generator_role.averaged_state())
        target = work.directory / "transformer"
        generator.save_pretrained(str(target))
        result = {
            "sigmas": list(contract.sigmas),
            "timesteps": list(contract.timesteps),
            "steps": self.steps,
            "seconds": time.monotonic() - started,
        }
        (work.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return replace(program.with_component("transformer", target), contract=contract)


class _Matcher:
    """The four roles of one distillation and the step that updates them."""

    def __init__(
        self,
        settings: DistributionMatching,
        program: Program,
        contract: SamplingContract,
        data: LatentDataset,
        generator: Any,
        fake: Any,
        real: Any,
        device: str,
    ) -> None:
        self._settings, self._contract, self._data, self._device = settings, contract, data, device
        teacher, guidance = program.teacher_contract, contract.embedded_guidance
        self._latents = program.latents
        self._shift, self._process = teacher.shift, contract.process
        self._generator, self._real = as_network(generator, guidance), as_network(real, guidance)
        self._real_pruned = skipping(real, program.prune_set, guidance=guidance)
        self._negative = on(data.negative, device)
        self.generator_role = Trained(
            "generator",
            generator,
            learning_rate=settings.learning_rate,
            betas=(0.0, 0.999),
            ema_decay=settings.ema_decay,
        )
        self._fake = as_network(fake, guidance)
        self._discriminator: Discriminator | None = None
        critic = fake
        if settings.gan_weight:
            middle = program.graph.blocks[len(program.graph.blocks) // 2]
            width = middle.streams[0].spec.shape[-1]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                critic = self._discriminator = Discriminator(fake, self._fake, middle.path, width).to(device)
        self._critic_model = critic
        self._fake_role = Trained("fake_score", critic, learning_rate=settings.critic_learning_rate, betas=(0.0, 0.999))
        self.roles = (self.generator_role, self._fake_role)

    def step(self, step: int, draw: torch.Generator) -> Mapping[str, float]:
        """The critic's updates, then one of the generator's (two-time-scale rule)."""
        values: dict[str, float] = {}
        for _ in range(self._settings.critic_updates):
            values.update(self._update_critic(draw))
        values.update(self._update_generator(draw))
        return values

    def _generate(self, draw: torch.Generator, *, grad: bool) -> tuple[torch.Tensor, Conditioning]:
        """Backward simulation: reach a random one of the student's levels by its own steps, then predict x0 there.

        Only the last prediction carries gradient. Returns x_g [n, ...] and its conditioning.
        """
        n = self._settings.batch
        shape, given = self._data.conditions(n, draw, self._latents)
        given = on(given, self._device)
        sigmas, timesteps = self._contract.sigmas, self._contract.timesteps
        last = int(torch.randint(len(sigmas), (), generator=draw))
        x = torch.randn(shape, generator=draw).to(self._device)
        for place in range(last + 1):
            timestep = torch.full((n,), timesteps[place], device=self._device)
            with torch.set_grad_enabled(grad and place == last):
                prediction = self._generator(x, timestep, given)
            if place < last:
                x = advance(self._contract, x, prediction, place, draw)
        return self._process.tweedie(x, prediction, torch.full((n,), sigmas[last], device=self._device)), given

    def _noised(self, x: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_s, s, noise) at levels drawn from the score range and shifted."""
        low, high = self._settings.score_range
        level = draw_levels(len(x), self._shift, draw, low=low, high=high).to(self._device)
        noise = torch.randn(x.shape, generator=draw).to(self._device)
        return self._process.add_noise(x, noise, level), level, noise

    def _update_critic(self, draw: torch.Generator) -> dict[str, float]:
        x, given = self._generate(draw, grad=False)
        noised, level, noise = self._noised(x, draw)
        loss = denoising_loss(self._fake, self._process, x, given, level, noise)
        if self._discriminator is not None:
            x_real, given_real = self._data.batch(len(x), draw)
            real, real_level, _ = self._noised(x_real.to(self._device), draw)
            t_real, t = self._process.timestep(real_level), self._process.timestep(level)
            logits = self._discriminator(real, t_real, on(given_real, self._device))
            loss = loss + self._settings.gan_weight * critic_term(logits, self._discriminator(noised, t, given))
        return self._fake_role.update(loss)

    def _update_generator(self, draw: torch.Generator) -> dict[str, float]:
        x, given = self._generate(draw, grad=True)
        noised, level, _ = self._noised(x, draw)
        timestep = self._process.timestep(level)
        with torch.no_grad():
            fake = self._process.tweedie(noised, self._fake(noised, timestep, given), level)
            guided = self._well_guided(noised.detach(), timestep, given, draw)
            real = self._process.tweedie(noised, guided, level)
            g = matching.gradient(x, fake, real)
        loss = matching.loss(x, g)
        if self._discriminator is not None:
            # The critic only lends its judgement: its own gradients of this term are thrown away.
            self._critic_model.requires_grad_(False)
            logits = self._discriminator(noised, timestep, given)
            loss = loss + self._settings.gan_weight * generator_term(logits)
        values = self.generator_role.update(loss)
        self._critic_model.requires_grad_(True)
        moving = x.detach().diff(dim=2).abs().mean()
        return {
            **values,
            "score_gap": float((fake - real).abs().mean()),
            "generated_std": float(x.detach().std()),
            "generated_motion": float(moving),
        }

    def _well_guided(
        self, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, draw: torch.Generator
    ) -> torch.Tensor:
        """The prediction of the guided teacher.

        Tweedie's formula is affine in the prediction and guidance weights sum to one: guiding either is the same.
        """
        n = len(x)

        def between(limits: tuple[float, float]) -> torch.Tensor:
            low, high = limits
            drawn = low + (high - low) * torch.rand(n, generator=draw)
            return drawn.reshape(n, *([1] * (x.ndim - 1))).to(self._device)

        inter, intra = between(self._settings.inter_cfg), between(self._settings.intra_cfg)
        conditional = unconditional = pruned = self._real(x, timestep, given)
        if self._settings.inter_cfg != (1.0, 1.0):
            unconditional = self._real(x, timestep, without_prompt(given, self._negative))
        if self._settings.intra_cfg != (0.0, 0.0):
            pruned = self._real_pruned(x, timestep, given)
        return well_guided(unconditional, conditional, pruned, inter, intra)
