"""Held-out figures that tell whether a training helps, beside its own loss."""

from __future__ import annotations

import torch

from flcompress.data.latents import LatentDataset
from flcompress.diffusion.conditioning import on
from flcompress.diffusion.process import Process
from flcompress.diffusion.sampling import Network


class HeldOutELBO:
    """The ELBO loss of a network on fixed held-out draws: E[w(s) |x0 - x0_hat|^2], per latent element.

    The same clips, noises and levels at every call, so that two values differ by the networks alone.

    Args:
        data: held-out clips.
        process: the model's noising process.
        draws: how many are scored.
        seed: of the draws.
        device: the networks' device.
    """

    LEVEL_RANGE = (0.02, 0.98)

    def __init__(self, data: LatentDataset, process: Process, draws: int, seed: int, device: str) -> None:
        draw = torch.Generator().manual_seed(seed)
        x0, conditioning = data.batch(draws, draw)
        noise = torch.randn(x0.shape, generator=draw)
        low, high = self.LEVEL_RANGE
        level = low + (high - low) * (torch.arange(draws) + 0.5) / draws
        self._process, self._conditioning = process, on(conditioning, device)
        self._x0, self._level = x0.to(device), level.to(device)
        self._x = process.add_noise(self._x0, noise.to(device), self._level)

    @torch.no_grad()
    def __call__(self, network: Network) -> float:
        prediction = network(self._x, self._process.timestep(self._level), self._conditioning)
        error = self._x0 - self._process.tweedie(self._x, prediction, self._level)
        per_draw = error.double().square().mean(dim=tuple(range(1, error.ndim)))
        return float((self._process.elbo_weight(self._level) * per_draw).mean())
