"""Held-out figures that tell whether a training helps, beside its own loss."""

from __future__ import annotations

import torch

from flcompress.data.latents import LatentDataset
from flcompress.diffusion.conditioning import on, taken
from flcompress.diffusion.process import Process
from flcompress.diffusion.sampling import Network
from flcompress.pipeline.world import World


class HeldOutELBO:
    """The ELBO loss of a network on fixed held-out draws: E[w(s) |x0 - x0_hat|^2], per latent element.

    The same clips, noises and levels at every call, so that two values differ by the networks alone.

    Args:
        data: held-out clips.
        process: the model's noising process.
        draws: how many are scored.
        seed: of the draws.
        device: the networks' device.
        at_once: draws in one forward of one process.
        world: the processes, each of which scores its share.
    """

    LEVEL_RANGE = (0.02, 0.98)

    def __init__(
        self, data: LatentDataset, process: Process, draws: int, seed: int, device: str, at_once: int, world: World
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        x0, conditioning = data.batch(draws, draw)
        noise = torch.randn(x0.shape, generator=draw)
        low, high = self.LEVEL_RANGE
        level = low + (high - low) * (torch.arange(draws) + 0.5) / draws
        self._process, self._device, self._world = process, device, world
        whole = process.add_noise(x0, noise, level)
        # Every process must make as many forwards as the others: the last ones repeat a draw, which does not count.
        own = -(-draws // world.size)
        mine = torch.arange(world.rank * own, (world.rank + 1) * own)
        counts = (mine < draws).double()
        parts = torch.split(mine.clamp(max=draws - 1), at_once)
        self._batches = [
            (x0[part], whole[part], level[part], count, taken(conditioning, part))
            for part, count in zip(parts, torch.split(counts, at_once), strict=True)
        ]

    @torch.no_grad()
    def __call__(self, network: Network) -> float:
        total = draws = 0.0
        for batch in self._batches:
            x0, x, level, count = (tensor.to(self._device) for tensor in batch[:4])
            prediction = network(x, self._process.timestep(level), on(batch[4], self._device))
            error = x0 - self._process.tweedie(x, prediction, level)
            per_draw = error.double().square().mean(dim=tuple(range(1, error.ndim)))
            total += float((count * self._process.elbo_weight(level) * per_draw).sum())
            draws += float(count.sum())
        sums = self._world.mean({"total": total, "draws": draws})
        return sums["total"] / sums["draws"]
