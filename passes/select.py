"""Choose the blocks to remove as a set, by the loss that removing them together adds; the weights do not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.program import CHOICE_NEEDS, Fact, Program
from flcompress.core.settings import Training
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.errors import PreconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import By, choose
from flcompress.passes.stochastic_depth import StochasticDepth

if TYPE_CHECKING:
    from flcompress.training.methods.joint_selection import Candidate

RIVALS: tuple[By, ...] = ("importance", "temporal-attention", "middle")


class Select(Pass):
    """Choose a prune set that costs least as a whole.

    Two blocks may each be harmless to lose because they cover for each other, and fatal to lose together; scores of
    single blocks cannot see that. The set grows by the block that costs least given those already in it (greedy, with
    re-scoring), then single blocks are swapped for near ones. Sets are compared on shared draws, by successive halving.
    The result is compared with the cheapest run of neighbouring blocks, the blocks nearest the middle, and the rankings
    of single blocks by `importance` and by `temporal-attention` where these came before; with `recover`, the best
    `candidates` are each trained for that many steps of stochastic depth, and the lowest held-out loss of the cut path
    decides.

    `stochastic-depth` and `prune` take the set with `by: joint`.

    `- select: {remove: 0.3, draws: 128, candidates: 3, recover: 100}`
    """

    name: ClassVar[str] = "select"
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SELECTED})

    remove: float = Field(gt=0, lt=1, description="share of the transformer's parameters that the set holds, at least")
    draws: int = Field(128, ge=16, multiple_of=16, description="clips drawn for the final comparison of sets")
    candidates: int = Field(3, ge=1, le=8, description="sets that are recovered, at most, the least costly ones")
    recover: int = Field(0, ge=0, description="steps of stochastic depth for each candidate; 0 judges without recovery")
    recover_batch: int = Field(16, gt=0, description="clips per step of the recovery")
    learning_rate: float = Field(5e-4, gt=0, description="learning rate of the recovery, as of stochastic-depth")
    batch: Literal[1, 2, 4, 8, 16] = Field(16, description="draws computed at once, by each process")

    @model_validator(mode="after")
    def _recovery_has_a_choice(self) -> Select:
        if self.recover and self.candidates < 2:
            raise ValueError(
                f"recover: {self.recover} given with candidates: 1, expected at least 2 candidates to decide between"
            )
        return self

    @override
    def held_out(self, clips: int, training: Training) -> int:
        return clips  # what a recovery trains is thrown away

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        # Races end early for most sets (half of the draws), and blocks before the first skipped one are recalled.
        removed = max(1, round(self.remove * blocks))
        sets = removed * blocks - removed * (removed - 1) / 2.0
        searched = 0.5 * 0.75 * sets * self.draws
        trained = 4.0 * self.recover * self.recover_batch * self.candidates if self.recover else 0.0
        alone = (Role("transformer", parameters),)
        both = (Role("model", parameters, trained=True), Role("original", parameters, forwards=1.0))
        return Cost(
            steps=self.recover * self.candidates,
            forwards=searched + trained,
            batch=self.recover_batch if self.recover else self.batch,
            roles=both if self.recover else alone,
            half=not self.recover,
            keeps_activations=not self.recover,
        )

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, CandidateRow, SelectResult
        from flcompress.training.methods.joint_selection import rank_correlation

        if Fact.PRUNED in program.facts:
            raise PreconditionError("select: the transformer is pruned already; put select before prune")
        graph, ranked, scored = self._search(program, context)
        program = replace(program, graph=graph)
        finalists = ranked[: self.candidates] if self.recover else []
        recovered = {found.name: self._recover(program, found, context) for found in finalists}
        chosen = min(finalists, key=lambda found: recovered[found.name]) if finalists else ranked[0]
        single = next((found for found in ranked if found.name == "importance"), None)
        if context.world.main:
            SelectResult(
                share=sum(graph.block(path).parameters for path in chosen.paths) / graph.parameters,
                draws=self.draws,
                candidates=[
                    CandidateRow(
                        name=found.name,
                        paths=list(found.paths),
                        mean=found.mean,
                        standard_error=found.standard_error,
                        recovered=recovered.get(found.name),
                    )
                    for found in ranked
                ],
                chosen=chosen.name,
                rank_correlation=rank_correlation(
                    [found.mean for found in finalists], [recovered[found.name] for found in finalists]
                ),
                overlap=_overlap(chosen.paths, single.paths) if single is not None else None,
                sets_scored=scored,
            ).write(context.directory / RESULT_FILE)
        return replace(program, prune_set=chosen.paths)

    def _search(self, program: Program, context: PassContext) -> tuple[BlockGraph, Sequence[Candidate], int]:
        """Return (the graph with what was found out of its blocks, candidates from the best, sets that were scored)."""
        import torch

        from flcompress.models.loading import load_transformer
        from flcompress.tracing.removal.on_disk import choose_removable
        from flcompress.training.methods.joint_selection import JointLoss, Search

        data, source = context.data(program), program.components["transformer"]
        half = context.precision == "bf16" and context.device == "cuda"  # as Stage I
        model = load_transformer(source, context.device, torch.bfloat16 if half else None)
        scores = JointLoss(
            model, program.graph, program.teacher_contract, data,
            seed=context.seed, batch=self.batch, world=context.world,
        )  # fmt: skip
        scored, expected = 0, 0
        ranked: list[Candidate] = []

        def report(sets: int) -> None:
            nonlocal scored
            scored += sets
            context.progress(min(scored, expected), expected, {})

        def best(graph: BlockGraph) -> tuple[str, ...]:
            nonlocal ranked, expected
            expected = max(expected, scored + 2 * len(graph.blocks) * max(1, round(self.remove * len(graph.blocks))))
            search = Search(scores=scores, graph=graph, share=self.remove, draws=self.draws, progress=report)
            ranked = search.candidates(self._rivals(program, graph))
            return tuple(dict.fromkeys(path for found in ranked for path in found.paths))

        # Every block of a candidate has to be one that can go; where one cannot, the search is repeated without it.
        graph, _ = choose_removable(source, program.graph, best)
        return graph, ranked, scored

    def _rivals(self, program: Program, graph: BlockGraph) -> dict[str, tuple[str, ...]]:
        """Return the sets that other ways of choosing give."""
        known = [by for by in RIVALS if CHOICE_NEEDS.get(by, frozenset()) <= program.facts]
        return {by: choose(graph, self.remove, by) for by in known}

    def _recover(self, program: Program, candidate: Candidate, context: PassContext) -> float:
        """Train stochastic depth on a candidate for a few steps; return the held-out loss of the cut path."""
        from flcompress.files import lines_of
        from flcompress.models.tensor_memory import free_gpu_memory
        from flcompress.training.engines import engine_of
        from flcompress.training.loop import METRICS_FILE

        folder = context.directory / candidate.name
        folder.mkdir(exist_ok=True)
        stage = StochasticDepth(
            remove=self.remove, steps=self.recover, batch=self.recover_batch, learning_rate=self.learning_rate
        )
        own = replace(context, directory=folder)
        stage.training.weights(engine_of(own), replace(program, prune_set=candidate.paths))
        free_gpu_memory()

        def last() -> float:
            lines = lines_of((folder / METRICS_FILE).read_text(encoding="utf-8"))
            return float([record for record in map(json.loads, lines) if "elbo_pruned" in record][-1]["elbo_pruned"])

        loss: float = context.world.broadcast(last)
        return loss


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    return len(set(a) & set(b)) / len(set(a) | set(b))
