"""Train a transformer by flow matching with dropped captions (used for the embedded benchmark's teacher)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.optimisation import Optimisation, Schedule, Warmup
from flcompress.core.program import Fact, Program
from flcompress.core.settings import Health, Training
from flcompress.core.steps import Cost, Pass, PassContext, Role

if TYPE_CHECKING:
    from flcompress.training.methods.pretraining import Pretraining


class Pretrain(Optimisation, Pass):
    """Train the transformer from its present weights on the recipe's clips and captions.

    `- pretrain: {steps: 6000, batch: 32}`
    """

    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 2
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.TRAINED})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED, Fact.ELASTIC})

    batch: int = Field(32, gt=0, description="clips per step")
    schedule: Schedule = "cosine"
    warmup: Warmup = 200
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the moving average, which becomes the result")
    shift: float = Field(3.0, gt=0, description="noise levels are drawn evenly, then shifted by this toward noise")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained with the empty prompt")

    @override
    def held_out(self, clips: int, training: Training) -> int:
        from flcompress.training.methods.pretraining import held_out_of

        return held_out_of(clips)

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            steps=self.steps,
            forwards=3.0 * self.steps * self.batch,
            recomputed=self.steps * self.batch,
            batch=self.batch,
            roles=(Role("model", parameters, trained=True, moments=self.moments, averaged=self.averages),),
        )

    @override
    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        from flcompress.training.methods.pretraining import MONITOR_CLIPS

        return float(MONITOR_CLIPS * health.evaluations(self.steps))

    @property
    def training(self) -> Pretraining:
        """The training with these arguments."""
        from flcompress.training.methods.pretraining import Pretraining

        return Pretraining(name=self.name, optimisation=self, shift=self.shift, caption_dropout=self.caption_dropout)

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, StepsResult
        from flcompress.models.loading import save_transformer
        from flcompress.training.engines import engine_of

        weights = self.training.weights(engine_of(context), program)
        target = context.directory / "transformer"
        if context.world.main:
            context.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            StepsResult(steps=self.steps).write(context.directory / RESULT_FILE)
        return (
            program.with_component("transformer", target)
            .with_component("original", target)
            .with_component("elastic", target)
        )
