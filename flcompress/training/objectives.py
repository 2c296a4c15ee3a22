"""Losses that more than one pass uses. Each reads like its equation."""

from __future__ import annotations

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.diffusion.flow import shift
from flcompress.diffusion.process import Process
from flcompress.diffusion.sampling import Network
from flcompress.draws import Draws


def draw_levels(draws: Draws, by: float, *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Noise levels [n]: uniform in [low, high], one in each of as many strata as the batch has samples, then shifted.

    Strata cost nothing and take most of the variance over noise levels out of a batch.
    """
    order = torch.randperm(draws.batch, generator=draws.shared)
    u = (order[draws.mine] + draws.uniform()) / draws.batch
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
