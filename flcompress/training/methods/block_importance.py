"""Score the blocks of a transformer by the ELBO that is lost when each is skipped, and judge how sure the order is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning
from flcompress.distributed.world import World
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import choose
from flcompress.progress import ProgressSink
from flcompress.training.methods.skipped_loss import skipped_losses
from flcompress.training.methods.stratified_draws import Stratified, StratifiedDraws

RESAMPLINGS = 1000
"""Of the draws, to see how sure a choice is."""

SURE = 0.95
"""Share of the resamplings that have to agree on a set for the measurement to end early."""


@dataclass(frozen=True, kw_only=True)
class BlockScores(StratifiedDraws):
    """The measurement of the `importance` pass; the attributes are the pass's arguments."""

    weighting: Literal["elbo", "uniform"]
    resolve: float | None

    def score(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        data: LatentDataset,
        seed: int,
        progress: ProgressSink,
        world: World,
    ) -> Scored:
        """Score every block; the contract names the noising process and the embedded guidance.

        The result does not depend on how many processes there are. With `resolve` it ends as soon as the set to remove
        is certain.
        """
        singles, elbo, resolve = [(block.path,) for block in graph.blocks], self.weighting == "elbo", self.resolve

        def losses(
            x0: torch.Tensor, conditioning: Conditioning, noise: torch.Tensor, level: torch.Tensor
        ) -> torch.Tensor:
            return skipped_losses(model, graph, contract, singles, x0, conditioning, noise, level, elbo=elbo)

        def certain(measured: Stratified) -> bool:
            scored = Scored.of(measured, graph)
            return resolve is not None and scored.sureness(scored.least(resolve)) >= SURE

        enough = None if resolve is None else certain
        measured = self.measure(losses, len(singles), contract, data, seed, progress, world, enough=enough)
        return Scored.of(measured, graph)


@dataclass(frozen=True, kw_only=True)
class Scored(Stratified):
    """The draws of a measurement, from which estimates and their certainty follow.

    Attributes:
        graph: the blocks, whose values w(s) (loss without block - loss with all) are the columns.
    """

    graph: BlockGraph

    @classmethod
    def of(cls, measured: Stratified, graph: BlockGraph) -> Scored:
        """Return the measurement with the blocks whose values it has."""
        return cls(levels=measured.levels, widths=measured.widths, strata=measured.strata, graph=graph)

    def estimates(self) -> dict[str, Estimate]:
        """Return the stratified mean and standard error of every block, by path."""
        return {block.path: self.estimate(index) for index, block in enumerate(self.graph.blocks)}

    def least(self, share: float) -> int:
        """Return how many of the least important blocks hold a share of the parameters."""
        return len(choose(self.graph.with_importance(self.estimates()), share, "importance"))

    def sureness(self, count: int) -> float:
        """Return the share of resamplings in which the `count` least important blocks are those of the estimate."""
        chosen = _least(self._means(torch.ones(1, self.draws, dtype=torch.float64)), count)
        return float((_least(self._resampled, count) == chosen).all(dim=1).double().mean())

    def membership(self, count: int) -> dict[str, float]:
        """Return, for every block, the share of resamplings in which it is among the `count` least important."""
        shares = _least(self._resampled, count).double().mean(dim=0).tolist()
        return {block.path: share for block, share in zip(self.graph.blocks, shares, strict=True)}

    @cached_property
    def _resampled(self) -> torch.Tensor:
        """Means [resamplings, blocks] of draws that are resampled within their strata, all blocks of a draw together.

        The bootstrap of Efron (1979), always by the same draws.
        """
        draw = torch.Generator().manual_seed(0)
        weights = []
        for values in self.strata:
            picks = torch.randint(len(values), (RESAMPLINGS, len(values)), generator=draw)
            times = torch.zeros(RESAMPLINGS, len(values), dtype=torch.float64)
            weights.append(times.scatter_add_(1, picks, torch.ones_like(times)))
        return self._means(torch.cat(weights, dim=1))

    def _means(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted stratified means [n, blocks]; weights [n, draws] are how often each draw counts."""
        parts = torch.split(weights, [len(values) for values in self.strata], dim=1)
        rows = zip(self.widths, parts, self.strata, strict=True)
        return torch.stack([width * (part @ values) / len(values) for width, part, values in rows]).sum(dim=0)


def _least(means: torch.Tensor, count: int) -> torch.Tensor:
    """Return which of the blocks are the `count` least important, [n, blocks]."""
    ranks = means.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(means.shape, dtype=torch.bool).scatter_(1, ranks, torch.ones_like(ranks, dtype=torch.bool))
