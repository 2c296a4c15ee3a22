"""Score the blocks of a transformer by the ELBO that is lost when each is skipped, and judge how sure the order is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import choose
from flcompress.progress import ProgressSink
from flcompress.training.methods.skipped_loss import log_levels, skipped_losses
from flcompress.training.objectives import level_range

RESAMPLINGS = 1000
"""Of the draws, to see how sure a choice is."""

SURE = 0.95
"""Share of the resamplings that have to agree on a set for the measurement to end early."""

ROUND = 16
"""Draws of each stratum between two questions whether the set is certain."""


@dataclass(frozen=True, kw_only=True)
class BlockScores:
    """The measurement of the `importance` pass; the attributes are the pass's arguments."""

    name: str
    draws: int
    noise_levels: int
    weighting: Literal["elbo", "uniform"]
    sigma_min: float
    sigma_max: float
    batch: int
    strata: Literal["even", "log"]
    resolve: float | None

    def levels(self, contract: SamplingContract) -> list[tuple[float, float]]:
        """Return (lowest, highest) noise level of each stratum: of equal widths in s, or in its logarithm."""
        low, high = level_range(
            contract, low=self.sigma_min, high=self.sigma_max, key="importance.sigma_min, sigma_max"
        )
        if self.strata == "log":
            bounds = [low * (high / low) ** (level / self.noise_levels) for level in range(self.noise_levels)]
            return list(pairwise([*bounds, high]))
        width = (high - low) / self.noise_levels
        return [(low + width * level, low + width * (level + 1)) for level in range(self.noise_levels)]

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

        Every process draws everything and computes its share of the batches: the result does not depend on how many
        processes there are. With `resolve` it ends as soon as the set to remove is certain.
        """
        singles, levels = [(block.path,) for block in graph.blocks], self.levels(contract)
        per_level = math.ceil(self.draws / self.noise_levels)
        # Even strata count alike to the last bit, whatever rounding makes of their bounds.
        widths = tuple(high - low if self.strata == "log" else 1.0 for low, high in levels)
        draws = [generator(seed, self.name, low, high) for low, high in levels]
        strata = [torch.zeros(0, len(singles), dtype=torch.float64) for _ in levels]
        done, total, batch = 0, per_level * self.noise_levels, 0
        at_a_time = per_level if self.resolve is None else min(per_level, ROUND)
        while len(strata[0]) < per_level:
            for stratum, (bounds, draw) in enumerate(zip(levels, draws, strict=True)):
                mine: dict[str, list[list[float]]] = {}  # number of the batch -> losses, block by block
                count = min(at_a_time, per_level - len(strata[stratum]))
                for start in range(0, count, self.batch):
                    n = min(self.batch, count - start)
                    batch += 1
                    x0, conditioning, noise, level, ratio = self._draw(data, bounds, n, draw)
                    if batch % world.size == world.rank:
                        world.heartbeat(f"{self.name}: batch {batch}")
                        arguments = (model, graph, contract, singles, x0, conditioning, noise, level)
                        losses = skipped_losses(*arguments, elbo=self.weighting == "elbo")
                        mine[str(batch)] = (ratio * losses).tolist()
                    done += n
                    progress(done, total, {})
                batches = {int(number): rows for own in world.all_gather(mine) for number, rows in own.items()}
                fresh = [torch.tensor(batches[number], dtype=torch.float64).T for number in sorted(batches)]
                strata[stratum] = torch.cat([strata[stratum], *fresh])
            scored = Scored(graph=graph, levels=tuple(levels), widths=widths, strata=tuple(strata))
            if self.resolve is not None and scored.sureness(scored.least(self.resolve)) >= SURE:
                break
        return scored

    def _draw(
        self, data: LatentDataset, bounds: tuple[float, float], n: int, draw: torch.Generator
    ) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (clips, conditioning, noise, levels [n], ratio [n] of the uniform density to the one drawn from)."""
        low, high = bounds
        x0, conditioning = data.batch(n, draw)
        noise = torch.randn(x0.shape, generator=draw)
        uniform = torch.rand(n, generator=draw)
        if self.strata == "log":
            return x0, conditioning, noise, *log_levels(uniform, low, high)
        return x0, conditioning, noise, low + (high - low) * uniform, torch.ones(n, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The draws of a measurement, from which estimates and their certainty follow.

    Attributes:
        graph: the blocks.
        levels: (lowest, highest) noise level of each stratum.
        widths: what each stratum counts: its share of the noise levels, up to a factor.
        strata: w(s) (loss without block - loss with all) of each draw [draws, blocks], for each stratum.
    """

    graph: BlockGraph
    levels: tuple[tuple[float, float], ...]
    widths: tuple[float, ...]
    strata: tuple[torch.Tensor, ...]

    @property
    def draws(self) -> int:
        """Number of draws."""
        return sum(map(len, self.strata))

    def estimates(self) -> dict[str, Estimate]:
        """Return the stratified mean and standard error of every block, by path; s is uniform over all strata."""
        return {block.path: self._estimate(index) for index, block in enumerate(self.graph.blocks)}

    def _estimate(self, block: int) -> Estimate:
        columns = [values[:, block].contiguous() for values in self.strata]
        means = [float(values.mean()) for values in columns]
        errors = [float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan for values in columns]
        whole, squares = sum(self.widths), [(w * error) ** 2 for w, error in zip(self.widths, errors, strict=True)]
        return Estimate(
            mean=sum(width * mean for width, mean in zip(self.widths, means, strict=True)) / whole,
            standard_error=math.sqrt(sum(squares)) / whole,
            per_level=tuple(
                (low, high, mean, error) for (low, high), mean, error in zip(self.levels, means, errors, strict=True)
            ),
        )

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
