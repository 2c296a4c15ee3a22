"""Losses and noise levels that more than one pass uses. Each reads like its equation."""

from __future__ import annotations

import torch

from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network
from flcompress.diffusion.process import Process, shift
from flcompress.draws import Draws
from flcompress.errors import PreconditionError


def draw_levels(draws: Draws, by: float, *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Draw noise levels [n]: uniform in [low, high], stratified into one stratum per sample of the batch, then shifted.

    Strata cost nothing and remove most of a batch's variance over noise levels.
    """
    order = torch.randperm(draws.batch, generator=draws.shared)
    u = (order[draws.mine] + draws.uniform()) / draws.batch
    return shift(low + (high - low) * u, by)


def level_range(
    contract: SamplingContract, by: float = 1.0, *, low: float = 0.0, high: float = 1.0, key: str
) -> tuple[float, float]:
    """Return the part of [low, high] for which the contract's transformer is responsible after a shift.

    Args:
        contract: a low- or high-noise expert's, or one of a single transformer, which is responsible for all levels.
        by: the shift.
        low: lowest level before the shift.
        high: highest level before the shift.
        key: names the range in an error.

    Raises:
        PreconditionError: the transformer is responsible for no level of the range.
    """
    if contract.experts is None:
        return low, high
    first, last = (level / (by - (by - 1.0) * level) for level in contract.levels)
    if not max(low, first) < min(high, last):
        raise PreconditionError(
            f"{key}: [{low:g}, {high:g}] given, but the {contract.experts.compressed}-noise expert is responsible for "
            f"[{first:.3g}, {last:.3g}]; expected a range that reaches into it"
        )
    return max(low, first), min(high, last)


def denoising_loss(
    network: Network,
    process: Process,
    x0: torch.Tensor,
    conditioning: Conditioning,
    level: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Return E |prediction - target|^2: flow matching (Lipman et al. 2023), or a discrete process's v or e loss."""
    prediction = network(process.add_noise(x0, noise, level), process.timestep(level), conditioning)
    return (prediction.float() - process.target(x0, noise, level)).square().mean()
