"""ICMD's recovery of a cut transformer: content and motion of the original's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Fact, Program
from flcompress.core.settings import Health, Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.errors import PreconditionError

if TYPE_CHECKING:
    from flcompress.training.methods.feature_distill import FeatureDistillTraining


class FeatureDistill(Optimisation, Pass):
    """Recover a cut transformer by the features of the original, frozen (after ICMD, Wu et al. 2025).

        L = L_task + content_weight L_icd + motion_weight (-D(h_student))

    L_task is the model's own loss on the data. L_icd compares what every kept block hands on with what the original's
    block of the same index does, frame by frame, over the original's mean square. D, which learns in turn with a hinge
    loss, tells the student's last features from the original's at their noise level: one head looks at each frame, the
    other along time at each place.

    `- feature-distill: {steps: 300, learning_rate: 5e-4}`
    """

    name: ClassVar[str] = "feature-distill"
    needs_data: ClassVar[bool] = True
    whole_clips: ClassVar[bool] = True
    distributed: ClassVar[bool] = True

    content_weight: float = Field(0.1, ge=0, description="weight of the features of single frames, L_icd")
    motion_weight: float = Field(
        1.0, ge=0, description="weight of the adversarial term; 0 leaves the discriminator out"
    )
    learning_rate: float = Field(1e-5, gt=0, description="learning rate of the transformer after the warm-up")
    discriminator_learning_rate: float = Field(1e-4, gt=0, description="the same of the discriminator")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of clips with the negative prompt (by default empty)"
    )

    @model_validator(mode="after")
    def _has_features_to_learn(self) -> FeatureDistill:
        if not self.content_weight and not self.motion_weight:
            raise ValueError(
                "content_weight: 0 given with motion_weight: 0, expected at least one above 0: without features it "
                "would train on the data alone"
            )
        return self

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        return frozenset({Fact.PRUNED})

    @override
    def flow(self, facts: frozenset[Fact]) -> frozenset[Fact]:
        if Fact.FEW_STEP in facts:
            raise PreconditionError(
                "feature-distill: the transformer is a few-step student already, whose levels this would undo; put it "
                "between prune and the few-step pass"
            )
        return super().flow(facts)

    @override
    def held_out(self, clips: int, training: Training) -> int:
        from flcompress.training.methods.stochastic_depth import held_out_of

        return held_out_of(clips)

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        from flcompress.training.methods.feature_discriminator import discriminator_parameters

        student = parameters / original
        roles = [
            Role("student", parameters, trained=True, moments=self.moments, averaged=self.averages),
            Role("original", original, forwards=1.0),
        ]
        if self.motion_weight:
            heads = discriminator_parameters(parameters, blocks)
            roles.append(Role("discriminator", heads, trained=True, moments=self.moments, blockless=True))
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (1.0 + 3.0 * student),
            recomputed=self.steps * self.batch * student,
            batch=self.batch,
            roles=tuple(roles),
            keeps_features=True,
        )

    @override
    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        from flcompress.training.methods.stochastic_depth import HELD_OUT_CLIPS

        return HELD_OUT_CLIPS * (health.evaluations(self.steps) * parameters / original + 1.0)  # the original once

    @property
    def training(self) -> FeatureDistillTraining:
        """The training with these arguments."""
        from flcompress.training.methods.feature_distill import FeatureDistillTraining

        return FeatureDistillTraining(
            name=self.name,
            optimisation=self,
            content_weight=self.content_weight,
            motion_weight=self.motion_weight,
            discriminator_learning_rate=self.discriminator_learning_rate,
            caption_dropout=self.caption_dropout,
        )

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, StepsResult
        from flcompress.models.loading import save_transformer
        from flcompress.training.engines import engine_of

        steps, weights = self.training.weights(engine_of(context), program)
        target = context.directory / "transformer"
        if context.world.main:
            context.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            StepsResult(steps=steps).write(context.directory / RESULT_FILE)
        return program.with_component("transformer", target)
