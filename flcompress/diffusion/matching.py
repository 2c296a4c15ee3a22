"""Distribution matching with a well-guided teacher (Yin et al. 2024, DMD2; docs/method.md, Stage III)."""

from __future__ import annotations

import torch

from flcompress.diffusion.process import expand_to

EPSILON = 1e-6
"""Keeps the normaliser away from zero where generator and teacher agree."""


def well_guided(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    conditional_pruned: torch.Tensor,
    inter: float | torch.Tensor,
    intra: float | torch.Tensor,
) -> torch.Tensor:
    """Return the teacher's prediction x_real = u + b1 (c - u) + b2 (c - c_pruned) (FastLightGen, Stage III).

    Args:
        unconditional: u, the unpruned model's prediction with the negative prompt [n, ...].
        conditional: c, its prediction with the prompt.
        conditional_pruned: c_pruned, the pruned model's prediction with the prompt.
        inter: b1, text guidance; a number or a tensor that broadcasts, one value per sample.
        intra: b2, the unpruned model guides away from its pruned self, as in autoguidance (Karras et al. 2024).
    """
    return unconditional + inter * (conditional - unconditional) + intra * (conditional - conditional_pruned)


def gradient(generated: torch.Tensor, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return g = (x_fake - x_real) / mean|x_g - x_real|, the mean taken per sample, in fp32.

    Args:
        generated: x_g, the generator's clean prediction [n, ...].
        fake: the fake score's clean prediction at the noised x_g [n, ...].
        real: the real score's clean prediction at the same point [n, ...].
    """
    return (fake.float() - real.float()) / (expand_to(normaliser(generated, real), generated) + EPSILON)


def normaliser(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return mean|x_g - x_real| of each sample, [n], in fp32: small where the generator has nothing left to learn."""
    return (generated.float() - real.float()).abs().mean(dim=tuple(range(1, generated.ndim)))


def loss(generated: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return L = 1/2 |x_g - stopgrad(x_g - g)|^2, averaged over elements: its gradient in x_g is g over their count."""
    target = (generated.float() - g).detach()
    return 0.5 * (generated.float() - target).square().mean()
