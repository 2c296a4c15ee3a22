"""Stage III: distribution matching distillation with a well-guided teacher."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.optimisation import Betas, Optimisation
from flcompress.core.program import Fact, Program
from flcompress.core.settings import EngineName, Health, Range, Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.errors import RequestError
from flcompress.training.distillation.settings import NO_INTER, NO_INTRA, DistillationSettings


class DistributionMatching(Optimisation, Pass):
    """Turn the transformer into a few-step generator that needs no guidance (DMD2 with FastLightGen's teacher).

    Four roles. The generator is the present, usually pruned, transformer. The fake score follows the generator's
    distribution by flow matching, several updates to each of the generator's. The real score is frozen and guides:

        x_real = u_full + b1 (c_full - u_full) + b2 (c_full - c_pruned)

    with b1 and b2 drawn from ranges for every sample. Optional is a discriminator: heads on features of the frozen real
    score, three blocks deep, which tell real clips from the generator's (DMD2's adversarial term).

    The fake score can be a LoRA on the real score's frozen weights. The generator can be one too: on the same weights
    where the real score is the elastic model, with the prune set skipped; else on its own weights, frozen. The finished
    one is merged into the pruned transformer (docs/training-memory.md). Beside a LoRA as the fake score, the real score
    can lean towards it (MagicDistillation's weak-to-strong matching).

    `- dmd: {student_steps: 4, inter_cfg: [3, 4], steps: 200}`
    """

    name: ClassVar[str] = "dmd"
    version: ClassVar[int] = 4
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.FEW_STEP})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    student_steps: int = Field(4, ge=1, le=16, description="network calls of the finished generator")
    inter_cfg: Range = Field((3.0, 4.0), description="b1, text guidance, range; 1 is none (u + w (c - u))")
    intra_cfg: Range = Field(
        (0.0, 0.0),
        description="b2, guidance of the full teacher away from its pruned self, range; 0 is none "
        "(the paper's best is 0.25; on the embedded benchmark none is better, decision 12)",
    )
    real_score: Literal["original", "elastic"] = Field(
        "original", description="whose weights: the model the recipe started from, or what stochastic depth made of it"
    )
    fake_score: Literal["full", "lora"] = Field(
        "full", description="a whole model, or a LoRA on the real score's weights, which it then starts from"
    )
    generator: Literal["full", "lora"] = Field(
        "full", description="a whole model, or a LoRA on the pruned transformer's frozen weights"
    )
    lora_rank: int = Field(32, ge=1, description="rank of LoRAs, on every linear layer of the blocks")
    critic_updates: int = Field(5, ge=1, description="updates of the fake score for each of the generator's")
    steps: int = Field(gt=0, description="updates of the generator")
    learning_rate: float = Field(2e-4, gt=0, description="learning rate of the generator after the warm-up")
    critic_learning_rate: float = Field(2e-4, gt=0, description="the same of the fake score")
    score_range: Range = Field(
        (0.02, 0.98), description="noise levels at which the scores are compared, before the shift"
    )
    ema_decay: float = Field(
        0.98, ge=0, lt=1, description="decay of the generator's moving average, which becomes the student"
    )
    betas: Betas = (0.0, 0.999)  # no momentum, since each role follows a moving target (Yin et al. 2024, DMD2)
    real_lean: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the fake score's LoRA that the real score computes with, which keeps the two near each "
        "other; 0 is none (MagicDistillation's a_weak)",
    )
    gan_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the adversarial term on frozen features of the real score, which rises from 0 in the "
        "first tenth of the steps; 0 disables it, published is 0.03",
    )
    gan_r1: float = Field(
        100.0,
        ge=0,
        description="weight of the discriminator's gradient penalty, by a finite difference; 0 saves one of its three "
        "forwards, for batches of 64 and more",
    )

    @model_validator(mode="after")
    def _leans_towards_a_lora(self) -> DistributionMatching:
        if self.real_lean and self.fake_score != "lora":
            raise ValueError(
                f"real_lean: {self.real_lean:g} given with fake_score: {self.fake_score}, expected fake_score: lora: "
                "the real score takes a share of its LoRA; set fake_score: lora or real_lean: 0"
            )
        return self

    @property
    def added(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Optimisation.added`. The penalty tells this adversarial term from that of version 0.1."""
        return (*Optimisation.added, "real_lean", *(() if self.gan_weight else ("gan_r1",)))

    @property
    def settings(self) -> DistillationSettings:
        """The settings of the distillation, from these arguments."""
        return DistillationSettings(optimisation=self, **self.model_dump(exclude=set(Optimisation.model_fields)))

    @override
    def evaluations(self, evaluations: int) -> int:
        return self.student_steps

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        needed = {Fact.TRAINED}
        if self.intra_cfg != NO_INTRA:
            needed.add(Fact.PRUNED)
        return frozenset(needed)

    @property
    @override
    def guides(self) -> bool:
        return self.inter_cfg != NO_INTER

    @property
    @override
    def needs_clips(self) -> bool:
        return self.gan_weight > 0

    @property
    @override
    def engines(self) -> tuple[EngineName, ...]:
        return tuple(engine for engine in super().engines if self._reason_against(engine) is None)

    def _reason_against(self, engine: EngineName) -> str | None:
        """Return why an engine cannot train these roles, or None if it can."""
        if self.settings.has_loras and engine == "zero3":
            return (
                "training.engine: zero3 given with LoRA roles in dmd, expected local, ddp, zero1, zero2 or fsdp2: "
                "DeepSpeed does not split weights that a LoRA is attached to; use fsdp2"
            )
        return None

    @override
    def held_out(self, clips: int, training: Training) -> int:
        from flcompress.training.distillation.roles import held_out_of

        return held_out_of(clips, training.health.samples)

    @override
    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        from flcompress.training.distillation.student_monitor import evaluation_forwards

        student = self.student_steps * parameters / original
        return evaluation_forwards(health, self.steps, student, teacher, critic=True)

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        from flcompress.training.distillation.discriminator import head_parameters
        from flcompress.training.shared_base import lora_parameters, width

        # The generator is pruned; the scores are as deep as the original. A LoRA's backward has no weights' gradients.
        pruned = parameters / original
        of_generator, of_fake = (2.0 if kind == "lora" else 3.0 for kind in (self.generator, self.fake_score))
        earlier = (self.student_steps - 1) / 2.0
        simulate = pruned * earlier
        guidance = (2.0 if self.guides else 1.0) + (pruned if self.intra_cfg != NO_INTRA else 0.0)
        generator = simulate + pruned * of_generator + 1.0 + guidance
        critic = simulate + pruned + of_fake
        if self.gan_weight:
            # The backward through a forward of the guidance, or through one of its own where that leans; then features
            # of samples, of clips and of clips nearby.
            generator += 2.0 if self.real_lean else 1.0
            critic += 3.0 if self.gan_r1 else 2.0

        generated = self.critic_updates * (earlier + 1.0) + earlier  # and one more, with a backward
        real_forwards, real_backwards = self._real_runs(guidance, pruned, generated)

        def role(name: str, kind: str, parameters: float, blocks: float, runs: float, **more: Any) -> Role:
            lora = kind == "lora"
            own = lora_parameters(parameters, blocks, self.lora_rank) if lora else parameters
            return Role(name, own, trained=True, moments=self.moments, runs=runs, blockless=lora, **more)

        heads = head_parameters(width(parameters, blocks))
        updates = self.critic_updates
        discriminator = Role(
            "discriminator", heads, trained=True, moments=self.moments, updates=updates, blockless=True
        )
        # The adversarial gradient keeps the real score's activations next to the generator's.
        both = parameters + original * bool(self.gan_weight)

        real = "shared base" if self.settings.shares else "real score"
        own_base = self.generator == "lora" and not self.settings.generator_shares
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (generator + self.critic_updates * critic),
            recomputed=self.steps * self.batch * (both / original + self.critic_updates),
            batch=self.batch,
            roles=(
                role("generator", self.generator, parameters, blocks, both, averaged=self.averages, forwards=generated),
                role("fake score", self.fake_score, original, blocks / pruned, original, updates=updates, forwards=1.0),
                *((discriminator,) if self.gan_weight else ()),
                Role(real, original, forwards=real_forwards, backwards=real_backwards),
                *((Role("generator's base", parameters, forwards=generated, backwards=1.0),) if own_base else ()),
            ),
        )

    def _real_runs(self, guidance: float, pruned: float, generated: float) -> tuple[float, float]:
        """Return a step's forwards of the real score, with those of LoRAs on it: without a backward, and with one.

        Args:
            guidance: forwards of the guidance.
            pruned: share of the model that the generator has.
            generated: forwards of the generator without a backward.
        """
        forwards, backwards = guidance, 0.0
        if self.gan_weight:
            # A forward of the guidance has a backward, or one of its own where that leans; see `cost`.
            forwards += self.critic_updates * (3.0 if self.gan_r1 else 2.0) - (0.0 if self.real_lean else 1.0)
            backwards += 1.0
        if self.fake_score == "lora":
            forwards, backwards = forwards + 1.0, backwards + self.critic_updates
        if self.settings.generator_shares:
            forwards, backwards = forwards + pruned * generated, backwards + pruned
        return forwards, backwards

    @override
    def check(self, training: Training) -> None:
        if against := self._reason_against(training.engine):
            raise RequestError(against)
        if self.settings.has_loras and training.compile:
            raise RequestError(
                "training.compile: true given with LoRA roles in dmd, expected false: every role's every layer would "
                "be compiled by itself; set it to false, or fake_score and generator to full"
            )

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, StudentResult
        from flcompress.diffusion.student import student_contract
        from flcompress.models.loading import load_transformer, save_transformer
        from flcompress.training.distillation.roles import Roles
        from flcompress.training.distillation.student_monitor import critic_limits, student_watch
        from flcompress.training.engines import engine_of
        from flcompress.training.loop import train
        from flcompress.training.shared_base import first_difference, merge

        if self.settings.generator_shares:
            parts = program.components
            name = context.world.broadcast(
                lambda: first_difference(parts["transformer"], parts["elastic"], program.kept)
            )
            if name:
                raise RequestError(
                    f"dmd.generator: lora given, but {name} of the transformer is not that of the elastic one, whose "
                    "weights a LoRA would start from; set real_score: original or generator: full"
                )
        contract = student_contract(program.teacher_contract, self.student_steps, program.family.sigmas)
        started = time.monotonic()
        roles = Roles(self.settings, program, contract, engine_of(context))
        steps = train(
            roles.step,
            roles.trained,
            engine=roles.engine,
            name=self.name,
            steps=self.steps,
            batch=self.batch,
            watch=student_watch(
                context,
                self.name,
                roles.health,
                guidance="inter_cfg and intra_cfg",
                limits=critic_limits(context, adversarial=self.gan_weight > 0),
            ),
            feed=roles.feed,
        )
        weights = roles.generator.averaged_state()
        target = context.directory / "transformer"
        if context.world.main:
            context.world.main_only(f"saving what {self.name} trained")
            if self.generator == "lora":
                full = load_transformer(program.components["transformer"]).state_dict()
                paths = program.kept if self.settings.generator_shares else {path: path for path in program.kept}
                weights = merge(full, weights, paths)
            save_transformer(program.components["transformer"], weights, target)
            result = {
                "sigmas": list(contract.sigmas),
                "timesteps": list(contract.timesteps),
                "steps": steps,
                "seconds": context.earlier_seconds + time.monotonic() - started,
            }
            StudentResult(**result).write(context.directory / RESULT_FILE)
        return program.with_few_step(target, contract)
