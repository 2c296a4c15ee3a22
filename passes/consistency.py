"""Consistency distillation: a student that jumps from any point of the teacher's path to its clean end (LCM)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Fact, Program
from flcompress.core.settings import Health, Range, Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.errors import RequestError

if TYPE_CHECKING:
    from flcompress.diffusion.contract import SamplingContract
    from flcompress.training.methods.consistency import ConsistencyTraining


class Consistency(Optimisation, Pass):
    """Turn the transformer into a few-step generator by consistency distillation (Luo et al. 2023, LCM).

    Every point of the guided teacher's path to a clip has that clip as its end. Clips are noised to a level s, the
    teacher takes one step to the next level s', and the student learns that both points have one end:

        L = sqrt(|f(x_s, s) - f_ema(x_s', s')|^2 + h^2) - h,    f(x, 0) = x

    where f_ema is the student with the moving average of its weights, which becomes the result. `ema_decay: 0` takes
    the student's own weights for it. The path ends at s' = 0, where the teacher's step itself is the target.

    `- consistency: {student_steps: 4, steps: 1000}`
    """

    name: ClassVar[str] = "consistency"
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.FEW_STEP})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    student_steps: int = Field(4, ge=1, le=16, description="network calls of the finished student")
    levels: int = Field(50, ge=1, le=1000, description="steps that the teacher's path is divided into")
    skip: int = Field(1, ge=1, description="how many of these the teacher takes at once, in one call")
    guidance: float | None = Field(
        None,
        ge=0,
        description="text guidance of the teacher, u + w (c - u), which the student has built in; 1 is none; default: "
        "the model's own guidance_scale",
    )
    embedded_guidance: Range | None = Field(
        None,
        description="range from which the scale that a guidance-distilled network takes as an input is drawn for every "
        "clip; default: the model's own scale alone",
    )
    learning_rate: float = Field(2e-4, gt=0, description="learning rate after the warm-up")
    ema_decay: float = Field(
        0.95, ge=0, lt=1, description="decay of the moving average, which is the target and becomes the student"
    )

    @model_validator(mode="after")
    def _skips_within_the_path(self) -> Consistency:
        if self.skip > self.levels:
            raise ValueError(
                f"skip: {self.skip} given, expected at most the {self.levels} levels; lower it or raise levels"
            )
        return self

    @override
    def evaluations(self, evaluations: int) -> int:
        return self.student_steps

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        return frozenset({Fact.TRAINED})

    @property
    @override
    def guides(self) -> bool:
        return self.guidance not in (None, 1.0)

    @override
    def held_out(self, clips: int, training: Training) -> int:
        from flcompress.training.distillation.roles import held_out_of

        return held_out_of(clips, training.health.samples)

    @override
    def check_model(self, contract: SamplingContract) -> None:
        if contract.experts is not None:
            raise RequestError(
                "consistency: this model has two experts, expected one transformer: a path ends at a clean clip, and "
                "each expert knows a part of the levels; use dmd"
            )
        if self.embedded_guidance is not None and contract.embedded_guidance is None:
            low, high = self.embedded_guidance
            raise RequestError(
                f"consistency.embedded_guidance: [{low:g}, {high:g}] given, but this transformer takes no guidance as "
                "an input, so its student could not tell one scale from another; give one number as guidance"
            )

    @override
    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        from flcompress.training.distillation.student_monitor import evaluation_forwards

        student = self.student_steps * parameters / original
        return evaluation_forwards(health, self.steps, student, teacher, critic=False)

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        # The teacher is as deep as the original and, unless told otherwise, guided; the target is another forward.
        student = parameters / original
        teacher = 1.0 if self.guidance == 1.0 else 2.0
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (teacher + student * 4.0),
            recomputed=self.steps * self.batch * student,
            batch=self.batch,
            roles=(
                Role("student", parameters, trained=True, moments=self.moments, averaged=self.averages, forwards=1.0),
                Role("teacher", original, forwards=teacher),
            ),
        )

    @property
    def training(self) -> ConsistencyTraining:
        """The training with these arguments."""
        from flcompress.training.methods.consistency import ConsistencyTraining

        return ConsistencyTraining(
            name=self.name,
            optimisation=self,
            levels=self.levels,
            skip=self.skip,
            guidance=self.guidance,
            embedded_guidance=self.embedded_guidance,
        )

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, StudentResult
        from flcompress.diffusion.student import student_contract
        from flcompress.models.loading import save_transformer
        from flcompress.training.engines import engine_of

        contract = student_contract(program.teacher_contract, self.student_steps, program.family.sigmas, by=self.name)
        started = time.monotonic()
        steps, weights = self.training.weights(engine_of(context), program, contract)
        target = context.directory / "transformer"
        if context.world.main:
            context.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            StudentResult(
                sigmas=list(contract.sigmas),
                timesteps=list(contract.timesteps),
                steps=steps,
                seconds=context.earlier_seconds + time.monotonic() - started,
            ).write(context.directory / RESULT_FILE)
        return program.with_few_step(target, contract)
