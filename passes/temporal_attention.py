"""F3-Pruning's score: how much the tokens of each block attend to other latent frames; no training."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import Fact, Program
from flcompress.core.settings import Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.errors import PreconditionError

if TYPE_CHECKING:
    from flcompress.training.methods.temporal_attention import TemporalAttentionScores


class TemporalAttention(Pass):
    """Score every block by the mass of its attention on other latent frames (after F3-Pruning).

    A_l is the mean over draws (x0, e, s), heads and 64 queries of a head of the attention that goes to tokens of other
    latent frames, among those of the clip: 0 if each frame attends to itself alone, (F - 1) / F if attention is uniform
    over F frames. `stochastic-depth` and `prune` take the blocks that have the least of it with
    `by: temporal-attention`.

    `- temporal-attention: {draws: 64}`
    """

    name: ClassVar[str] = "temporal-attention"
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION_SCORED})

    draws: int = Field(64, ge=8, description="clips drawn, each with its own noise and noise level")
    noise_levels: int = Field(4, ge=1, description="strata of the noise level; the draws are spread evenly over them")
    sigma_min: float = Field(0.02, gt=0, lt=1, description="lowest noise level")
    sigma_max: float = Field(0.98, gt=0, le=1, description="highest noise level")
    batch: int = Field(8, gt=0, description="draws computed at once, by each process")

    @override
    def held_out(self, clips: int, training: Training) -> int:
        return clips  # it scores, and trains nothing

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(forwards=self.draws, batch=self.batch, roles=(Role("transformer", parameters),), half=True)

    @property
    def scores(self) -> TemporalAttentionScores:
        """The measurement with these arguments."""
        from flcompress.training.methods.temporal_attention import TemporalAttentionScores

        return TemporalAttentionScores(name=self.name, **self.model_dump())

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        import torch

        from flcompress.core.records import RESULT_FILE, BlockScore, TemporalAttentionResult
        from flcompress.models.configs import check_transformer_config
        from flcompress.models.loading import load_transformer

        source = program.components["transformer"]
        if program.family.token_grid(check_transformer_config(source), program.latents[1:])[0] == 1:
            raise PreconditionError(
                "temporal-attention: the clips have one latent frame, so no attention leaves it and no block can be "
                "told from another; use the importance pass"
            )
        data = context.data(program)
        half = context.precision == "bf16" and context.device == "cuda"  # as Stage I
        model = load_transformer(source, context.device, torch.bfloat16 if half else None)
        started = time.monotonic()
        attention, uniform = self.scores.score(
            model, program.graph, program.teacher_contract, data, context.seed, context.progress, context.world
        )
        if context.world.main:
            TemporalAttentionResult(
                draws=self.draws,
                uniform=uniform,
                blocks=[
                    BlockScore(
                        path=path,
                        mean=score.mean,
                        standard_error=score.standard_error,
                        per_level=list(score.per_level),
                    )
                    for path, score in attention.items()
                ],
                seconds=context.earlier_seconds + time.monotonic() - started,
            ).write(context.directory / RESULT_FILE)
        return replace(program, graph=program.graph.with_temporal_attention(attention))
