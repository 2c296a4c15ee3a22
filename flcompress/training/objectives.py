"""Losses that more than one pass uses. Each reads like its equation."""

from __future__ import annotations

import torch

from flcompress.diffusion.flow import add_noise, shift, velocity
from flcompress.diffusion.sampling import Network

NUM_TRAIN_TIMESTEPS = 1000.0


def draw_sigmas(n: int, by: float, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """`n` noise levels: uniform in [low, high], one in each of n equal strata, then shifted by `by`.

    Strata cost nothing and take most of the variance over noise levels out of a batch.
    """
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return shift(low + (high - low) * u, by)


def predict(network: Network, x: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """The network's velocity at noise levels sigma [n]."""
    return network(x, sigma * NUM_TRAIN_TIMESTEPS, embeds)


def flow_matching_loss(
    network: Network, x0: torch.Tensor, embeds: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """E |v(x_s, s) - (e - x0)|^2 (Lipman et al. 2023)."""
    v = predict(network, add_noise(x0, noise, sigma), sigma, embeds)
    return (v.float() - velocity(x0, noise)).square().mean()
