"""Sampling by a contract: the one sampler behind training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flcompress.diffusion.conditioning import Conditioning, without_prompt
from flcompress.diffusion.contract import SamplingContract, scheduler_of
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

    x, walk = noise, Walk(contract)
    if contract.guided and negative is None:
        raise ValueError("negative: None given, but the contract guides; pass the negative prompt's conditioning")
    for place in range(len(contract.timesteps)):
        x = walk(x, predict(network, contract, place, x, conditioning, negative), place, again)
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


class Walk:
    """The steps of one batch along a contract's levels, from the first to the last, as its stock scheduler steps.

    A solver looks back at earlier steps: it takes its own. One that adds noise on the way gives way to the steps of its
    ODE (docs/decisions/0007-families.md).
    """

    def __init__(self, contract: SamplingContract) -> None:
        self._contract = contract
        self._solver = scheduler_of(contract) if contract.solver else None
        if self._solver is not None:
            self._solver.set_begin_index(0)

    def __call__(
        self, x: torch.Tensor, prediction: torch.Tensor, place: int, again: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """See `advance`; `place` is 0, 1, 2 ... in turn."""
        if self._solver is None:
            return advance(self._contract, x, prediction, place, again)
        timestep = self._solver.timesteps[place]
        # Some solvers return the prediction's dtype.
        stepped: torch.Tensor = self._solver.step(prediction.to(x.dtype), timestep, x, return_dict=False)[0]
        return stepped


def advance(
    contract: SamplingContract,
    x: torch.Tensor,
    prediction: torch.Tensor,
    place: int,
    again: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """From the contract's level number `place` to the next one (0 after the last), one step of first order.

    `again` gives standard normal noise shaped as a tensor, for a stochastic contract.
    """
    level, target = (torch.full((len(x),), s, device=x.device) for s in contract.steps[place])
    if not contract.stochastic:
        return contract.process.step(x, prediction, level, target)
    x0 = contract.process.tweedie(x, prediction, level)
    return contract.process.add_noise(x0, again(x).to(x.device), target)
