"""The changes that a run made to its model: sizes, steps, the blocks and why they went. Numbers, not words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flcompress.core.records import (
    BenchFile,
    BlockScore,
    ContractPart,
    ImportanceResult,
    PruneResult,
    SelectResult,
    StochasticDepthResult,
    TemporalAttentionResult,
)
from flcompress.diffusion.contract import SamplingContract
from flcompress.errors import RecordError
from flcompress.ir.block import Block, Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.reporting.reading import RunRecord
from flcompress.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling of a model: the part of a sampling contract that decides its cost.

    Attributes:
        evaluations: network evaluations for one sample: guidance doubles them.
        own: those of the transformer that is compressed; fewer where it is one of two experts.
    """

    steps: int
    guidance: float
    sigmas: tuple[float, ...]
    evaluations: int
    own: int

    @classmethod
    def read(cls, contract: ContractPart) -> Sampling:
        """Return the cost of sampling by a stored contract."""
        sampling = SamplingContract.from_dict(contract.dump())
        return cls(
            steps=sampling.num_inference_steps,
            guidance=sampling.guidance_scale,
            sigmas=sampling.sigmas,
            evaluations=sampling.evaluations,
            own=sampling.own_evaluations,
        )


@dataclass(frozen=True, kw_only=True)
class Headline:
    """Model before and after.

    `work_ratio` counts evaluations of the compressed transformer times parameters; `measured` is a wall-clock ratio.
    """

    parameters_before: int
    parameters_after: int
    blocks_before: int
    blocks_after: int
    before: Sampling
    after: Sampling
    measured: Interval | None = None
    measured_on: str = ""

    @property
    def share(self) -> float:
        """Share of the parameters that is left."""
        return self.parameters_after / self.parameters_before

    @property
    def work_ratio(self) -> float:
        """Evaluations times parameters, before over after."""
        return self.before.own * self.parameters_before / (self.after.own * self.parameters_after)


@dataclass(frozen=True, kw_only=True)
class BlockFate:
    """A block of the original model; `rank` counts from 1, the least important of those scored.

    `attention` is its attention on other frames, where that was measured.
    """

    block: Block
    share: float
    score: Estimate | None
    rank: int | None
    fate: str  # "kept", "removed", or "chosen": in the prune set of a model that is not cut
    reason: str = ""
    attention: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """How sure the choice by importance is, from bootstrap resamplings of the draws.

    Attributes:
        sureness: share of the resamplings that choose the same set.
        open: blocks that only some of them choose, with their share, the most often chosen first.
    """

    sureness: float
    open: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The original graph, what became of each block, and the edges (original paths) that data flows along now."""

    graph: BlockGraph
    fates: list[BlockFate]
    edges: list[tuple[str, str]]
    weighting: str = ""
    draws: int | None = None
    u_index: float | None = None
    certificate: Mapping[str, Any] | None = None
    certainty: Certainty | None = None
    selection: SelectResult | None = None
    uniform_attention: float | None = None

    @property
    def scored(self) -> list[tuple[BlockFate, Estimate]]:
        """Blocks with an importance score, with it."""
        return [(fate, fate.score) for fate in self.fates if fate.score is not None]

    @property
    def attentive(self) -> list[tuple[BlockFate, Estimate]]:
        """Blocks whose attention on other frames was measured, with it."""
        return [(fate, fate.attention) for fate in self.fates if fate.attention is not None]

    @property
    def gone(self) -> list[BlockFate]:
        """Blocks that were not kept."""
        return [fate for fate in self.fates if fate.fate != "kept"]


def headline(run: RunRecord) -> Headline | None:
    """Return the figures before and after; None while the run has not stored its starting model."""
    if not run.entries:
        return None
    first, last = run.entries[0], run.entries[-1]
    before, after, program = first.graph(), last.graph(), last.program()
    measured, measured_on = None, ""
    rows = run.bench.rows if run.bench is not None else []
    preferred = [row for row in rows if "eager" in row.backend and row.what == "denoising"]
    for row in (preferred or rows)[:1]:
        measured, measured_on = row.ratio.interval, f"{row.backend}, {row.what}"
        measured_on += conditions(run.bench)
    return Headline(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        blocks_before=len(before.blocks),
        blocks_after=len(after.blocks),
        before=Sampling.read(program.teacher_contract),
        after=Sampling.read(program.contract),
        measured=measured,
        measured_on=measured_on,
    )


def conditions(bench: BenchFile | None) -> str:
    """Return at which size, in which precision and on what a bench was made; empty for one that did not note it."""
    if bench is None or bench.size is None:
        return ""
    shape = f"{bench.size.frames} x {bench.size.height} x {bench.size.width}"
    batch = f", batch {bench.batch}" if bench.batch != 1 else ""
    where = bench.machine.get("gpu") or (bench.device or "").upper()
    return f", {bench.family} at {shape}{batch}, {bench.precision} on {where}"


def blocks(run: RunRecord) -> Blocks | None:
    """Return the fate of every block; None while the run has not stored its starting model."""
    if not run.entries:
        return None
    graph = run.entries[0].graph()
    importance = run.result("importance", ImportanceResult)
    prune = run.result("prune", PruneResult)
    attention = run.result("temporal-attention", TemporalAttentionResult)
    scores = _scores(importance, graph)
    masses = _estimates(attention.blocks) if attention is not None else {}
    reasons: dict[str, str] = {}
    edges = list(graph.flows)
    if prune is not None:
        gone, fate = prune.removed, "removed"
        reasons = prune.reasons
        cut = run.entry("prune")
        names = prune.kept
        edges = [(names.get(a, a), names.get(b, b)) for a, b in cut.graph().flows] if cut else edges
    else:
        depth = run.result("stochastic-depth", StochasticDepthResult)
        gone, fate = (depth.prune_set if depth is not None else []), "chosen"
    unknown = sorted(set(gone) - {block.path for block in graph.blocks})
    if unknown:
        raise RecordError(f"{run.path}: removed blocks name '{unknown[0]}', which the starting model does not have")
    ranked = sorted((path for path in scores), key=lambda path: scores[path].mean)
    total = sum(block.parameters for block in graph.blocks)
    return Blocks(
        graph=graph,
        fates=[
            BlockFate(
                block=block,
                share=block.parameters / total if total else 0.0,
                score=scores.get(block.path),
                rank=ranked.index(block.path) + 1 if block.path in scores else None,
                fate=fate if block.path in gone else "kept",
                reason=reasons.get(block.path, "") or block.reason,
                attention=masses.get(block.path),
            )
            for block in graph.blocks
        ],
        edges=edges,
        weighting=importance.weighting if importance is not None else "",
        draws=importance.draws if importance is not None else None,
        u_index=importance.u_index if importance is not None else None,
        certificate=prune.certificate if prune is not None else None,
        certainty=_certainty(importance, set(gone), ranked),
        selection=run.result("select", SelectResult),
        uniform_attention=attention.uniform if attention is not None else None,
    )


def _certainty(importance: ImportanceResult | None, gone: set[str], ranked: list[str]) -> Certainty | None:
    """Return how sure the set is; None where it is not that of the least important blocks."""
    count = len(gone)
    if importance is None or not 0 < count <= len(importance.sureness) or gone != set(ranked[:count]):
        return None
    members = importance.membership[count - 1]
    return Certainty(
        sureness=importance.sureness[count - 1], open=sorted(members.items(), key=lambda item: item[1], reverse=True)
    )


def _scores(importance: ImportanceResult | None, graph: BlockGraph) -> dict[str, Estimate]:
    """Return the scores of the importance pass, or those a graph already carries."""
    if importance is None:
        return {block.path: block.importance for block in graph.blocks if block.importance is not None}
    return _estimates(importance.blocks)


def _estimates(scores: Iterable[BlockScore]) -> dict[str, Estimate]:
    return {
        score.path: Estimate(mean=score.mean, standard_error=score.standard_error, per_level=tuple(score.per_level))
        for score in scores
    }
