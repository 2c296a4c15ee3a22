"""The ELBO that is lost when sets of blocks are skipped, draw by draw, and noise levels drawn where its variance is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, to_device
from flcompress.ir.graph import BlockGraph
from flcompress.models.network import as_network
from flcompress.tracing.prefix import remember


@torch.no_grad()
def skipped_losses(
    model: Any,
    graph: BlockGraph,
    contract: SamplingContract,
    sets: Iterable[tuple[str, ...]],
    x0: torch.Tensor,
    conditioning: Conditioning,
    noise: torch.Tensor,
    level: torch.Tensor,
    *,
    elbo: bool = True,
) -> torch.Tensor:
    """Return w(s) (|x0 - x0_hat^(-S)|^2 - |x0 - x0_hat|^2), the mean per latent element, for every set and draw.

    The full forward is computed once; a skipped one begins at its first skipped block.

    Args:
        model: the transformer.
        graph: its blocks.
        contract: names the noising process and the embedded guidance.
        sets: paths of blocks to skip together.
        x0: clean latents [n, channels, frames, height, width].
        conditioning: theirs.
        noise: of the shape of `x0`.
        level: noise levels s [n].
        elbo: whether w is the ELBO's weight; else it is 1.

    Returns:
        [sets, n], in float64.
    """
    device = next(model.parameters()).device
    x0, noise, level = (tensor.to(device) for tensor in (x0, noise, level))
    conditioning, process = to_device(conditioning, device), contract.process
    weight = process.elbo_weight(level) if elbo else torch.ones_like(level)
    x, network = process.add_noise(x0, noise, level), as_network(model, contract.embedded_guidance)

    def loss() -> torch.Tensor:
        error = (x0 - process.tweedie(x, network(x, process.timestep(level), conditioning), level)).double()
        return (weight * error.square().mean(dim=tuple(range(1, x.ndim)))).cpu()

    with remember(model, graph) as memory:
        full, losses = loss(), []
        for paths in sets:
            with memory.skipping(*paths):
                losses.append(loss() - full)
    return torch.stack(losses)


def log_levels(uniform: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return levels [n] with a density proportional to 1 / s, and the ratio [n] of the uniform density to that one.

    A mean over the levels, weighted by the ratio, has the expectation of one over uniform levels. The ELBO's weight
    grows like 1 / s^3 and the error falls like s^2, so that uniform levels leave nearly all of the variance to the few
    lowest draws.

    Args:
        uniform: numbers in [0, 1).
        low: lowest level, above 0.
        high: highest level.
    """
    level = low * (high / low) ** uniform
    return level, level.double() * math.log(high / low) / (high - low)
