"""Held-out figures that tell whether a training helps, beside its own loss."""

from __future__ import annotations

import torch

from flcompress.data.latents import LatentDataset
from flcompress.diffusion.flow import add_noise, elbo_weight, tweedie
from flcompress.diffusion.sampling import Network
from flcompress.training.objectives import predict


class HeldOutELBO:
    """The ELBO loss of a network on fixed held-out draws: E[w(s) |x0 - x0_hat|^2], per latent element.

    The same clips, noises and levels at every call, so that two values differ by the networks alone.

    Args:
        data: held-out clips.
        draws: how many are scored.
        seed: of the draws.
        device: the networks' device.
    """

    SIGMA_RANGE = (0.02, 0.98)

    def __init__(self, data: LatentDataset, draws: int, seed: int, device: str) -> None:
        draw = torch.Generator().manual_seed(seed)
        x0, embeds = data.batch(draws, draw)
        noise = torch.randn(x0.shape, generator=draw)
        low, high = self.SIGMA_RANGE
        sigma = low + (high - low) * (torch.arange(draws) + 0.5) / draws
        self._x0, self._embeds, self._sigma = x0.to(device), embeds.to(device), sigma.to(device)
        self._x = add_noise(self._x0, noise.to(device), self._sigma)

    @torch.no_grad()
    def __call__(self, network: Network) -> float:
        error = self._x0 - tweedie(self._x, predict(network, self._x, self._sigma, self._embeds), self._sigma)
        per_draw = error.double().square().mean(dim=tuple(range(1, error.ndim)))
        return float((elbo_weight(self._sigma) * per_draw).mean())
