"""Score the blocks of a transformer by the ELBO that is lost when each is skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, to_device
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.models.network import as_network
from flcompress.progress import ProgressSink
from flcompress.tracing.prefix import remember
from flcompress.training.objectives import level_range


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

    def levels(self, contract: SamplingContract) -> list[tuple[float, float]]:
        """Return (lowest, highest) noise level of each stratum."""
        low, high = level_range(
            contract, low=self.sigma_min, high=self.sigma_max, key="importance.sigma_min, sigma_max"
        )
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
    ) -> dict[str, Estimate]:
        """Score every block, by path; the contract names the noising process and the embedded guidance.

        Every process draws everything and computes its share of the batches: the result does not depend on how many
        processes there are.
        """
        paths, batch = [block.path for block in graph.blocks], 0
        losses: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
        per_level = math.ceil(self.draws / self.noise_levels)
        done, total = 0, per_level * self.noise_levels
        levels = self.levels(contract)
        for low, high in levels:
            draw = generator(seed, self.name, low, high)
            mine: dict[str, list[list[float]]] = {}  # number of the batch -> differences, block by block
            for start in range(0, per_level, self.batch):
                n = min(self.batch, per_level - start)
                x0, conditioning = data.batch(n, draw)
                noise = torch.randn(x0.shape, generator=draw)
                sigma = low + (high - low) * torch.rand(n, generator=draw)
                batch += 1
                if batch % world.size == world.rank:
                    world.heartbeat(f"{self.name}: batch {batch}")
                    differences = self.differences(model, graph, contract, x0, conditioning, noise, sigma)
                    mine[str(batch)] = [differences[path].tolist() for path in paths]
                done += n
                progress(done, total, {})
            batches = {int(number): rows for own in world.all_gather(mine) for number, rows in own.items()}
            for index, path in enumerate(paths):
                values = [value for number in sorted(batches) for value in batches[number][index]]
                losses[path].append(torch.tensor(values, dtype=torch.float64))
        return {path: self._estimate(levels, strata) for path, strata in losses.items()}

    @torch.no_grad()
    def differences(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        x0: torch.Tensor,
        conditioning: Conditioning,
        noise: torch.Tensor,
        sigma: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return w(s) (loss without block - loss with all) of each draw: path -> [n], in float64."""
        device = next(model.parameters()).device
        x0, noise, sigma = (tensor.to(device) for tensor in (x0, noise, sigma))
        conditioning, process = to_device(conditioning, device), contract.process
        weight = process.elbo_weight(sigma) if self.weighting == "elbo" else torch.ones_like(sigma)
        x, network = process.add_noise(x0, noise, sigma), as_network(model, contract.embedded_guidance)

        def loss() -> torch.Tensor:
            error = (x0 - process.tweedie(x, network(x, process.timestep(sigma), conditioning), sigma)).double()
            return (weight * error.square().mean(dim=tuple(range(1, x.ndim)))).cpu()

        with remember(model, graph) as memory:
            full = loss()
            differences = {}
            for block in graph.blocks:
                with memory.skipping(block.path):
                    differences[block.path] = loss() - full
        return differences

    def _estimate(self, levels: list[tuple[float, float]], strata: list[torch.Tensor]) -> Estimate:
        """Return the stratified mean and standard error; the strata are equally likely and equally large."""
        means = [float(values.mean()) for values in strata]
        errors = [float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan for values in strata]
        return Estimate(
            mean=sum(means) / len(means),
            standard_error=math.sqrt(sum(error**2 for error in errors)) / len(errors),
            per_level=tuple(
                (low, high, mean, error) for (low, high), mean, error in zip(levels, means, errors, strict=True)
            ),
        )
