"""The distribution matching gradient (Yin et al. 2024, DMD2; docs/method.md, Stage III)."""

from __future__ import annotations

import torch

from flcompress.diffusion.flow import spread

EPSILON = 1e-6
"""Keeps the normaliser away from zero where generator and teacher agree."""


def gradient(generated: torch.Tensor, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """g = (x_fake - x_real) / mean|x_g - x_real|, the mean taken per sample, in fp32.

    Args:
        generated: x_g, the generator's clean prediction [n, ...].
        fake: the fake score's clean prediction at the noised x_g [n, ...].
        real: the real score's clean prediction at the same point [n, ...].
    """
    return (fake.float() - real.float()) / (spread(normaliser(generated, real), generated) + EPSILON)


def normaliser(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """mean|x_g - x_real| of each sample, [n], in fp32: small where the generator has nothing left to learn."""
    return (generated.float() - real.float()).abs().mean(dim=tuple(range(1, generated.ndim)))


def loss(generated: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """L = 1/2 |x_g - stopgrad(x_g - g)|^2, the mean over elements: its gradient in x_g is g, over the element count."""
    target = (generated.float() - g).detach()
    return 0.5 * (generated.float() - target).square().mean()
