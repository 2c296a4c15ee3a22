"""Measure on clips at noise levels of strata: the draws, shared by all that is measured, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.ir.block import Estimate
from flcompress.progress import ProgressSink
from flcompress.training.methods.skipped_loss import log_levels
from flcompress.training.objectives import level_range

ROUND = 16
"""Draws of each stratum between two questions whether they are enough."""

Values = Callable[[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor], torch.Tensor]
"""(clips, their conditioning, noise, noise levels [n]) -> values [columns, n] in float64."""


@dataclass(frozen=True, kw_only=True)
class Stratified:
    """Values by noise level, from which estimates follow.

    Attributes:
        levels: (lowest, highest) noise level of each stratum.
        widths: what each stratum counts: its share of the noise levels, up to a factor.
        strata: values [draws, columns] of each stratum.
    """

    levels: tuple[tuple[float, float], ...]
    widths: tuple[float, ...]
    strata: tuple[torch.Tensor, ...]

    @property
    def draws(self) -> int:
        """Number of draws."""
        return sum(map(len, self.strata))

    def estimate(self, column: int) -> Estimate:
        """Return the stratified mean and standard error of a column; s is uniform over all strata."""
        columns = [values[:, column].contiguous() for values in self.strata]
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


@dataclass(frozen=True, kw_only=True)
class StratifiedDraws:
    """Draws of (clip, noise, noise level), as many in each stratum of the level.

    Attributes:
        name: the pass, which seeds the draws and names the levels in an error.
        draws: their number.
        noise_levels: number of strata.
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
        batch: draws computed at once, by each process.
        strata: strata of equal widths in s, or in its logarithm.
    """

    name: str
    draws: int
    noise_levels: int
    sigma_min: float
    sigma_max: float
    batch: int
    strata: Literal["even", "log"] = "even"

    def levels(self, contract: SamplingContract) -> list[tuple[float, float]]:
        """Return (lowest, highest) noise level of each stratum: of equal widths in s, or in its logarithm."""
        key = f"{self.name}.sigma_min, sigma_max"
        low, high = level_range(contract, low=self.sigma_min, high=self.sigma_max, key=key)
        if self.strata == "log":
            bounds = [low * (high / low) ** (level / self.noise_levels) for level in range(self.noise_levels)]
            return list(pairwise([*bounds, high]))
        width = (high - low) / self.noise_levels
        return [(low + width * level, low + width * (level + 1)) for level in range(self.noise_levels)]

    def measure(
        self,
        values: Values,
        columns: int,
        contract: SamplingContract,
        data: LatentDataset,
        seed: int,
        progress: ProgressSink,
        world: World,
        *,
        enough: Callable[[Stratified], bool] | None = None,
    ) -> Stratified:
        """Measure; the contract names the levels.

        Every process draws everything and computes its share of the batches: the result does not depend on how many
        processes there are.

        Args:
            values: what is measured.
            columns: how many values it gives for each draw.
            contract: names the noise levels.
            data: clips.
            seed: the recipe's.
            progress: called with the number of draws that are done.
            world: the processes.
            enough: asked after every `ROUND` draws of each stratum whether to end early; None measures on all draws.
        """
        levels = self.levels(contract)
        per_level = math.ceil(self.draws / self.noise_levels)
        # Even strata count alike to the last bit, whatever rounding makes of their bounds.
        widths = tuple(high - low if self.strata == "log" else 1.0 for low, high in levels)
        draws = [generator(seed, self.name, low, high) for low, high in levels]
        strata = [torch.zeros(0, columns, dtype=torch.float64) for _ in levels]
        done, total, batch = 0, per_level * self.noise_levels, 0
        at_a_time = per_level if enough is None else min(per_level, ROUND)
        while len(strata[0]) < per_level:
            for stratum, (bounds, draw) in enumerate(zip(levels, draws, strict=True)):
                mine: dict[str, list[list[float]]] = {}  # number of the batch -> values, column by column
                count = min(at_a_time, per_level - len(strata[stratum]))
                for start in range(0, count, self.batch):
                    n = min(self.batch, count - start)
                    batch += 1
                    x0, conditioning, noise, level, ratio = self._draw(data, bounds, n, draw)
                    if batch % world.size == world.rank:
                        world.heartbeat(f"{self.name}: batch {batch}")
                        mine[str(batch)] = (ratio * values(x0, conditioning, noise, level)).tolist()
                    done += n
                    progress(done, total, {})
                batches = {int(number): rows for own in world.all_gather(mine) for number, rows in own.items()}
                fresh = [torch.tensor(batches[number], dtype=torch.float64).T for number in sorted(batches)]
                strata[stratum] = torch.cat([strata[stratum], *fresh])
            measured = Stratified(levels=tuple(levels), widths=widths, strata=tuple(strata))
            if enough is not None and enough(measured):
                break
        return measured

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
