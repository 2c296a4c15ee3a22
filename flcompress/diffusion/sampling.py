"""Sampling by a contract: the one sampler behind training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flcompress.diffusion.contract import SamplingContract, scheduler_of
from flcompress.diffusion.network import Conditioning, Network, with_negative_prompt


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the guided prediction u + w (c - u), so that w = 1 is no guidance (Ho & Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class IntraGuidance:
    """Guidance of a model away from a weaker one (Karras et al. 2024; FastLightGen's second term).

    Attributes:
        weak: the weaker model, with the same noise levels; FastLightGen's is the model without its prune set.
        scale: b2 in u + b1 (c - u) + b2 (c - c_weak).
    """

    weak: Network
    scale: float


@torch.no_grad()
def sample(
    network: Network,
    contract: SamplingContract,
    noise: torch.Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    generator: torch.Generator | None = None,
    intra: IntraGuidance | None = None,
) -> torch.Tensor:
    """Walk the contract's noise levels from `noise` to clean latents.

    Args:
        network: the denoiser; two experts are combined first (`Experts.combine`).
        contract: levels, guidance and whether each step follows the ODE (Euler) or predicts x0 and adds fresh noise.
        noise: starting latents [n, channels, frames, height, width].
        conditioning: conditioning of the n samples.
        negative: conditioning of the negative prompt, [1, ...]; required if the contract guides.
        generator: source of the re-noising of a stochastic contract.
        intra: guidance away from a weaker model, in addition to the contract's by text.

    Returns:
        Clean latents, shaped as `noise`.
    """

    def draw_noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x, walk = noise, Walk(contract)
    if contract.guided and negative is None:
        raise ValueError("negative: None given, but the contract guides; pass the negative prompt's conditioning")
    for step in range(len(contract.timesteps)):
        x = walk(x, predict(network, contract, step, x, conditioning, negative, intra), step, draw_noise)
    return x


def predict(
    network: Network,
    contract: SamplingContract,
    step: int,
    x: torch.Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    intra: IntraGuidance | None = None,
) -> torch.Tensor:
    """Return the network's prediction at call number `step` of the contract, guided if the contract guides there."""
    timestep = torch.full((len(x),), contract.timesteps[step], device=x.device)
    guided = prediction = network(x, timestep, conditioning)
    scale = contract.guidance_at(step)
    if scale != 1.0 and negative is not None:
        guided = guide(network(x, timestep, with_negative_prompt(conditioning, negative)), prediction, scale)
    if intra is None:
        return guided
    return guided + intra.scale * (prediction - intra.weak(x, timestep, conditioning))


class Walk:
    """The steps of one batch along a contract's levels, from the first to the last, as its stock scheduler steps.

    A solver takes its own steps, which depend on earlier ones. A scheduler that adds noise on the way is replaced by
    the steps of its ODE (docs/decisions/0007-families.md).
    """

    def __init__(self, contract: SamplingContract) -> None:
        self._contract = contract
        self._solver = scheduler_of(contract) if contract.solver else None
        if self._solver is not None:
            self._solver.set_begin_index(0)

    def __call__(
        self, x: torch.Tensor, prediction: torch.Tensor, step: int, draw_noise: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Take a step, see `advance`; `step` is 0, 1, 2 ... in turn."""
        if self._solver is None:
            return advance(self._contract, x, prediction, step, draw_noise)
        timestep = self._solver.timesteps[step]
        # Some solvers return the prediction's dtype.
        stepped: torch.Tensor = self._solver.step(prediction.to(x.dtype), timestep, x, return_dict=False)[0]
        return stepped


def advance(
    contract: SamplingContract,
    x: torch.Tensor,
    prediction: torch.Tensor,
    step: int,
    draw_noise: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Take one first-order step from the contract's level number `step` to the next one (0 after the last).

    Args:
        contract: levels and process.
        x: latents at the level [n, ...].
        prediction: the network's, shaped as `x`.
        step: index of the level.
        draw_noise: returns standard normal noise shaped as a tensor, for a stochastic contract.
    """
    level, target = (torch.full((len(x),), s, device=x.device) for s in contract.steps[step])
    if not contract.stochastic:
        return contract.process.step(x, prediction, level, target)
    x0 = contract.process.tweedie(x, prediction, level)
    return contract.process.add_noise(x0, draw_noise(x).to(x.device), target)
