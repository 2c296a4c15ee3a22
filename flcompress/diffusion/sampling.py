"""Sampling by a contract: the one sampler behind training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flcompress.diffusion.conditioning import Conditioning, without_prompt
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.guidance import guide

Network = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(latents [n, channels, frames, height, width], timestep [n], conditioning) -> prediction, shaped as the latents."""


@torch.no_grad()
def sample(
    network: Network,
    contract: SamplingContract,
    noise: torch.Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Walk the contract's noise levels from `noise` to clean latents.

    Args:
        network: what predicts; of two experts, both as one (`Experts.joined`).
        contract: levels, guidance and whether each step follows the ODE (Euler) or predicts x0 and noises it again.
        noise: starting latents [n, channels, frames, height, width].
        conditioning: of the n samples.
        negative: of the negative prompt, [1, ...]; needed where the contract guides.
        generator: source of the re-noising of a stochastic contract.

    Returns:
        Clean latents, shaped as `noise`.
    """

    def again(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = noise
    if contract.guided and negative is None:
        raise ValueError("negative: None given, but the contract guides; pass the negative prompt's conditioning")
    for place in range(len(contract.timesteps)):
        x = advance(contract, x, predict(network, contract, place, x, conditioning, negative), place, again)
    return x


def predict(
    network: Network,
    contract: SamplingContract,
    place: int,
    x: torch.Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
) -> torch.Tensor:
    """The network's prediction at the contract's level number `place`, guided where the contract guides there."""
    timestep = torch.full((len(x),), contract.timesteps[place], device=x.device)
    prediction = network(x, timestep, conditioning)
    scale = contract.guidance_at(place)
    if scale == 1.0 or negative is None:
        return prediction
    return guide(network(x, timestep, without_prompt(conditioning, negative)), prediction, scale)


def advance(
    contract: SamplingContract,
    x: torch.Tensor,
    prediction: torch.Tensor,
    place: int,
    again: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """From the contract's level number `place` to the next one (0 after the last), as its stock scheduler steps.

    A stock scheduler of higher order has the same levels and other steps; this is the one of first order.

    `again` gives standard normal noise shaped as a tensor, for a stochastic contract.
    """
    level, target = (torch.full((len(x),), s, device=x.device) for s in contract.steps[place])
    if not contract.stochastic:
        return contract.process.step(x, prediction, level, target)
    x0 = contract.process.tweedie(x, prediction, level)
    return contract.process.add_noise(x0, again(x).to(x.device), target)
