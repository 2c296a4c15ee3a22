"""Stage I: which blocks matter. Tweedie-ELBO scoring by skipping one block at a time; no training."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import Fact, Program
from flcompress.core.settings import Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.ir.selection import u_index

if TYPE_CHECKING:
    from flcompress.training.methods.block_importance import BlockScores


class Importance(Pass):
    """Score every block by the ELBO that is lost when it is skipped.

    I_k = E[ w(s) (|x0 - x0_hat^(-k)|^2 - |x0 - x0_hat|^2) ], the mean taken per latent element; x0_hat by Tweedie. All
    blocks meet the same draws (x0, e, s), so each difference is paired and its standard error small.

    `- importance: {draws: 256, noise_levels: 4, weighting: elbo}`
    """

    name: ClassVar[str] = "importance"
    added: ClassVar[tuple[str, ...]] = ("strata", "resolve")
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED})

    draws: int = Field(256, ge=8, description="clips drawn, each with its own noise and noise level")
    noise_levels: int = Field(4, ge=1, description="strata of the noise level; the draws are spread evenly over them")
    strata: Literal["even", "log"] = Field(
        "even",
        description="strata of equal widths in s, or in log s with as many draws at low levels, where the ELBO weight "
        "puts nearly all of the variance; the expectation is the same",
    )
    resolve: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the parameters that is to be removed: ends before `draws` once 95 % of bootstrap "
        "resamplings agree on the blocks that hold it; null: all draws",
    )
    weighting: Literal["elbo", "uniform"] = Field(
        "elbo", description="elbo: the continuous-time ELBO weight (1 - s) / s^3; uniform: 1"
    )
    sigma_min: float = Field(0.02, gt=0, lt=1, description="lowest noise level; the ELBO weight diverges at 0")
    sigma_max: float = Field(0.98, gt=0, le=1, description="highest noise level")
    batch: int = Field(32, gt=0, description="draws computed at once, by each process")

    @override
    def held_out(self, clips: int, training: Training) -> int:
        return clips  # it scores, and trains nothing

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            forwards=self.draws * (blocks + 3) / 2.0,
            batch=self.batch,
            roles=(Role("transformer", parameters),),
            half=True,
            keeps_activations=True,
        )

    @property
    def scores(self) -> BlockScores:
        """The measurement with these arguments."""
        from flcompress.training.methods.block_importance import BlockScores

        return BlockScores(name=self.name, **self.model_dump())

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        import torch

        from flcompress.core.records import RESULT_FILE, ImportanceResult
        from flcompress.models.loading import load_transformer

        data, scores = context.data(program), self.scores
        half = (
            context.precision == "bf16" and context.device == "cuda"
        )  # a CPU's scores are fp32: quick enough, and exact
        model = load_transformer(program.components["transformer"], context.device, torch.bfloat16 if half else None)
        started = time.monotonic()
        scored = scores.score(
            model, program.graph, program.teacher_contract, data, context.seed, context.progress, context.world
        )
        estimates = scored.estimates()
        graph = program.graph.with_importance(estimates)
        means = [estimates[block.path].mean for block in graph.blocks]
        result = {
            "weighting": self.weighting,
            "draws": scored.draws if self.resolve else self.draws,
            "levels": [list(level) for level in scores.levels(program.teacher_contract)],
            "blocks": [
                {
                    "path": block.path,
                    "mean": estimates[block.path].mean,
                    "standard_error": estimates[block.path].standard_error,
                    "per_level": [list(level) for level in estimates[block.path].per_level],
                }
                for block in graph.blocks
            ],
            "sureness": [round(scored.sureness(count), 3) for count in range(1, len(graph.blocks))],
            "membership": [
                {path: round(share, 3) for path, share in scored.membership(count).items() if 0.0005 < share < 0.9995}
                for count in range(1, len(graph.blocks))
            ],
            "u_index": u_index(means),
            "seconds": context.earlier_seconds + time.monotonic() - started,
            "forwards_equivalent": (len(graph.blocks) + 3) / 2.0,
        }
        if context.world.main:
            ImportanceResult(**result).write(context.directory / RESULT_FILE)
        return replace(program, graph=graph)
