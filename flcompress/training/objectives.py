"""Losses that more than one pass uses. Each reads like its equation."""

from __future__ import annotations

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.diffusion.flow import shift
from flcompress.diffusion.process import Process
from flcompress.diffusion.sampling import Network


def draw_levels(n: int, by: float, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """`n` noise levels: uniform in [low, high], one in each of n equal strata, then shifted by `by`.

    Strata cost nothing and take most of the variance over noise levels out of a batch.
    """
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return shift(low + (high - low) * u, by)


def denoising_loss(
    network: Network,
    process: Process,
    x0: torch.Tensor,
    conditioning: Conditioning,
    level: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """E |prediction - target|^2: flow matching (Lipman et al. 2023), or the v or epsilon loss of a discrete process."""
    prediction = network(process.add_noise(x0, noise, level), process.timestep(level), conditioning)
    return (prediction.float() - process.target(x0, noise, level)).square().mean()
