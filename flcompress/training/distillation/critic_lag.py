"""The lag of the fake score behind the generator that it follows. Formula in docs/health.md."""

from __future__ import annotations

import torch

from flcompress.diffusion.network import Conditioning, Network, select
from flcompress.diffusion.process import Process
from flcompress.distributed.world import World


@torch.no_grad()
def critic_lag(
    fake: Network,
    other: Network,
    process: Process,
    x0: torch.Tensor,
    conditioning: Conditioning,
    level: torch.Tensor,
    noise: torch.Tensor,
    *,
    at_once: int,
    world: World,
) -> float:
    """Return by what share the fake score's denoising loss on fresh samples exceeds the one that it should have.

    A perfect denoiser leaves a residual that no function of its input explains. So its loss should be that of the best
    linear combination of what is available: its own prediction F, another network's R, the noised sample, a constant:

        lag = |F - v|^2 / min_w |w1 F + w2 R + w3 x_s + w4 - v|^2 - 1 >= 0

    summed over samples and elements, with v the training target. 0 if none of these improves on F.

    Args:
        fake: the fake score.
        other: a network of the same noising process that is not trained, such as the real score.
        process: the noising process.
        x0: this process's fresh samples of the generator [n, channels, frames, height, width].
        conditioning: the samples'.
        level: noise levels [n].
        noise: shaped as x0.
        at_once: samples in one forward.
        world: the processes, each with its share of the samples.
    """
    gram = torch.zeros(5, 5, dtype=torch.float64)
    for first in range(0, len(x0), at_once):
        part = slice(first, first + at_once)
        clean, e, s = (tensor[part] for tensor in (x0, noise, level))
        part_conditioning = select(conditioning, part)
        x, timestep = process.add_noise(clean, e, s), process.timestep(s)
        columns = [fake(x, timestep, part_conditioning), other(x, timestep, part_conditioning), x, torch.ones_like(x)]
        flat = torch.stack([column.double().flatten() for column in (*columns, process.target(clean, e, s))])
        gram += (flat @ flat.T).cpu()
        world.heartbeat()
    mean = world.all_mean({str(index): value for index, value in enumerate(gram.flatten().tolist())})
    gram = torch.tensor(list(mean.values()), dtype=torch.float64).reshape(5, 5)
    inner, onto, square = gram[:4, :4], gram[:4, 4], gram[4, 4]
    # The columns can be alike: the fake score starts as a copy of the other network.
    weights = torch.linalg.pinv(inner, rtol=1e-10, hermitian=True) @ onto
    # Rounding leaves a little where the fit is perfect.
    best = (square - 2.0 * weights @ onto + weights @ inner @ weights).clamp(min=1e-12 * float(square))
    return float((square - 2.0 * onto[0] + inner[0, 0]) / best) - 1.0
