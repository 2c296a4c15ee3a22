"""Sampling by a contract: the one sampler behind training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.flow import add_noise, tweedie
from flcompress.diffusion.guidance import guide

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [n, ...], timestep [n], prompt embeddings [n, tokens, channels]) -> velocity [n, ...]."""


def as_network(transformer: torch.nn.Module) -> Network:
    """A diffusers transformer as a plain function."""

    def call(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return transformer(hidden_states=x, timestep=timestep, encoder_hidden_states=embeds, return_dict=False)[0]  # type: ignore[no-any-return]

    return call


@torch.no_grad()
def sample(
    network: Network,
    contract: SamplingContract,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Walk the contract's noise levels from `noise` to clean latents.

    Args:
        network: the velocity.
        contract: levels, guidance and whether each step follows the ODE (Euler) or predicts x0 and noises it again.
        noise: starting latents [n, channels, frames, height, width].
        prompt_embeds: [n, tokens, channels].
        negative_embeds: the empty prompt [tokens, channels]; needed where the contract guides.
        generator: source of the re-noising of a stochastic contract.

    Returns:
        Clean latents, shaped as `noise`.
    """
    x, n = noise, len(noise)
    guided = contract.guidance_scale != 1.0
    if guided and negative_embeds is None:
        raise ValueError("negative_embeds: None given, but the contract guides; pass the empty prompt's embedding")
    for sigma, following, timestep in zip(
        contract.sigmas, (*contract.sigmas[1:], 0.0), contract.timesteps, strict=True
    ):
        t = torch.full((n,), timestep, device=x.device)
        v = network(x, t, prompt_embeds)
        if guided and negative_embeds is not None:
            v = guide(network(x, t, negative_embeds.expand(n, -1, -1)), v, contract.guidance_scale)
        if contract.stochastic:
            x0 = tweedie(x, v, torch.full((n,), sigma, device=x.device))
            again = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = add_noise(x0, again, torch.full((n,), following, device=x.device))
        else:
            x = x + (following - sigma) * v
    return x
