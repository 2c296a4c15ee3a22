"""Cut blocks out of the transformer, to a share of its parameters, with a certificate."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import CHOICE_NEEDS, Fact, Program
from flcompress.core.steps import Pass, PassContext
from flcompress.errors import PreconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import By, choose, score_of


class Prune(Pass):
    """Remove blocks until the wanted share of the parameters is gone.

    The removal is accepted only with a certificate: saved, and loaded by stock diffusers, the smaller model reproduces
    the model with those blocks skipped, exactly. The weights are copied on disk, tensor by tensor and byte by byte; a
    model too large to be tried in memory is certified on a narrow one of its class and depth. After stochastic depth
    only blocks of its prune set can go.

    `- prune: {remove: 0.3}`
    """

    name: ClassVar[str] = "prune"
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    remove: float = Field(gt=0, lt=1, description="share of the transformer's parameters to remove, at least")
    by: By = Field(
        "importance",
        description="which blocks go: the least important, the set that select found, those of the lowest temporal "
        "attention, random ones, or the middle",
    )

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        return CHOICE_NEEDS.get(self.by, frozenset())

    @override
    def remaining(self, parameters: float) -> float:
        return parameters * (1.0 - self.remove)

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, PruneResult
        from flcompress.tracing.removal.on_disk import choose_removable, remove_on_disk

        if Fact.PRUNED in program.facts:
            raise PreconditionError("prune: the transformer is pruned already; put one prune pass in the recipe")
        among = program.prune_set if Fact.ELASTIC in program.facts else None
        source = program.components["transformer"]
        graph, paths = choose_removable(
            source,
            program.graph,
            lambda graph: choose(
                graph, self.remove, self.by, seed=context.seed, among=among, selected=program.prune_set
            ),
        )
        target = context.directory / "transformer"
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed
        removal = remove_on_disk(source, paths, target)
        certificate = removal.certificate
        result = removal.without(graph)
        record = {
            "removed": list(paths),
            "kept": {new: old for old, new in certificate.kept.items()},
            "parameters_before": graph.parameters,
            "parameters_after": result.parameters,
            "share": result.parameters / graph.parameters,
            "certificate": asdict(certificate),
            "certified_on": "its own weights" if removal.stand_in is None else {"stand_in": dict(removal.stand_in)},
            "reasons": {path: self._reason(graph, path) for path in paths},
        }
        PruneResult(**record).write(context.directory / RESULT_FILE)
        return replace(
            program.with_component("transformer", target),
            graph=result,
            prune_set=paths,
            kept=_compose(certificate.kept, program.kept),
        )

    def _reason(self, graph: BlockGraph, path: str) -> str:
        score = score_of(graph.block(path), self.by)
        if score is None:
            return f"chosen by {self.by}"
        scores = [score_of(block, self.by) for block in graph.blocks]
        ranked = sorted(score.mean for score in scores if score is not None)
        least = "least important" if self.by == "importance" else "lowest"
        return (
            f"{self.by.replace('-', ' ')} {score.mean:.3g} ± {score.standard_error:.2g}, "
            f"{ranked.index(score.mean) + 1} of {len(ranked)} from the {least}"
        )


def _compose(names: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """Return new path -> path in the original, from old -> new of this cut and old -> original before it."""
    return {new: before[old] for old, new in names.items()}
