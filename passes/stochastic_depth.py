"""Stage II: dynamic probabilistic pruning. One set of weights learns to work with and without its prune set."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.optimisation import Optimisation, Schedule, Warmup
from flcompress.core.program import CHOICE_NEEDS, Fact, Program
from flcompress.core.settings import Health, Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.ir.selection import By, choose

if TYPE_CHECKING:
    from flcompress.training.methods.stochastic_depth import StochasticDepthTraining


class StochasticDepth(Optimisation, Pass):
    """Skip each block of the prune set at random and learn to agree with the full depth.

    Every step each block of the prune set is skipped with `skip_probability`, one draw for the whole batch, and

        L_II = alpha |f_pruned - target|^2 + (1 - alpha) |f_pruned - v|^2

    where the target is the full-depth output, without gradient, of the same weights ("self", as in the paper), of their
    moving average ("ema"), or of the original weights ("frozen"). With "self", agreeing on nonsense is an optimum too;
    the held-out ELBO of both paths decides, and `training.health` says what follows where the full path drifts away
    from the original.

    `- stochastic-depth: {remove: 0.3, steps: 400}`
    """

    name: ClassVar[str] = "stochastic-depth"
    version: ClassVar[int] = 3
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})
    added: ClassVar[tuple[str, ...]] = (*Optimisation.added, "ema_decay")

    remove: float = Field(gt=0, lt=1, description="share of the parameters that the prune set holds, at least")
    by: By = Field(
        "importance",
        description="which form it: the least important, the set that select found, those of the lowest temporal "
        "attention, random ones, or the middle",
    )
    skip_probability: float = Field(0.5, gt=0, le=1, description="probability of each block of the prune set, per step")
    alpha: float = Field(1.0, ge=0, le=1, description="weight of self-distillation against the data")
    target: Literal["frozen", "ema", "self"] = Field("frozen", description="whose full-depth output is the target")
    learning_rate: float = Field(5e-4, gt=0, description="learning rate after the warm-up")
    schedule: Schedule = "cosine"
    warmup: Warmup = 20
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of clips with the negative prompt (by default empty)"
    )

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        return CHOICE_NEEDS.get(self.by, frozenset())

    @override
    def held_out(self, clips: int, training: Training) -> int:
        from flcompress.training.methods.stochastic_depth import held_out_of

        return held_out_of(clips)

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        averaged = self.averages or self.target == "ema"
        left, frozen = 1.0 - self.remove * self.skip_probability, float(self.target == "frozen")
        model = Role("model", parameters, trained=True, moments=self.moments, averaged=averaged)
        roles = [replace(model, forwards=1.0 - frozen, backwards=left), Role("original", parameters, forwards=frozen)]
        if self.target == "ema":
            roles.append(Role("averaged target", parameters))
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (1.0 + 3.0 * left),
            recomputed=self.steps * self.batch * left,
            batch=self.batch,
            roles=tuple(roles),
        )

    @override
    def evaluation_forwards(self, parameters: float, original: float, teacher: int, health: Health) -> float:
        from flcompress.training.methods.stochastic_depth import HELD_OUT_CLIPS

        # Both paths each time, and the original once.
        return HELD_OUT_CLIPS * (health.evaluations(self.steps) * (2.0 - self.remove) + 1.0)

    @property
    def training(self) -> StochasticDepthTraining:
        """The training with these arguments."""
        from flcompress.training.methods.stochastic_depth import StochasticDepthTraining

        return StochasticDepthTraining(
            name=self.name,
            optimisation=self,
            **self.model_dump(include={"skip_probability", "alpha", "target", "caption_dropout"}),
        )

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.ir.serial import from_json
        from flcompress.models.loading import save_transformer
        from flcompress.training.engines import engine_of

        graph, paths = context.world.broadcast(lambda: self._choose(program, context))
        program = replace(program, graph=from_json(graph), prune_set=tuple(paths))
        weights = self.training.weights(engine_of(context), program)
        target = context.directory / "transformer"
        if context.world.main:
            context.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            self._write_result(program, context)
        return program.with_component("transformer", target).with_component("elastic", target)

    def _choose(self, program: Program, context: PassContext) -> tuple[str, tuple[str, ...]]:
        """Return (graph, prune set); a block that cannot be removed must not be trained to be skipped either."""
        from flcompress.ir.serial import to_json
        from flcompress.tracing.removal.on_disk import choose_removable

        graph, paths = choose_removable(
            program.components["transformer"],
            program.graph,
            lambda graph: choose(graph, self.remove, self.by, seed=context.seed, selected=program.prune_set),
        )
        return to_json(graph), paths

    def _write_result(self, program: Program, context: PassContext) -> None:
        from flcompress.core.records import RESULT_FILE, StochasticDepthResult
        from flcompress.files import lines_of
        from flcompress.training.loop import METRICS_FILE

        parameters = sum(program.graph.block(path).parameters for path in program.prune_set)
        lines = lines_of((context.directory / METRICS_FILE).read_text(encoding="utf-8"))
        result = {
            "prune_set": list(program.prune_set),
            "removed_share": parameters / program.graph.parameters,
            "by": self.by,
            "target": self.target,
            "monitor": [record for record in map(json.loads, lines) if "elbo_full" in record],
        }
        StochasticDepthResult(**result).write(context.directory / RESULT_FILE)
