"""Synthetic damage of clips, of known strength, from which the classifier's imaging-quality head learns.

Every damage takes clips [n, 3, frames, height, width] in [-1, 1], strengths [n] in [0, 1] (0 changes nothing, 1 is as
bad as it gets) and a generator, and returns clips of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Damage = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]

BLUR_PIXELS = 2.5
NOISE = 0.6
GHOST_SHARE = 0.55
FLICKER = 0.7
ERASED_PIXELS = 7.0
SMEAR_PIXELS = 6.0
WARP_PIXELS = 2.5


def _expand(strength: torch.Tensor) -> torch.Tensor:
    return strength[:, None, None, None, None]


def _filter(clips: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Filter every frame of a clip with the clip's own kernel [n, k, k]; the padding is black."""
    n, colours, frames, height, width = clips.shape
    size = kernels.shape[-1]
    pictures = clips.permute(1, 2, 0, 3, 4).reshape(colours * frames, n, height, width)
    padded = F.pad(pictures, [size // 2] * 4, value=-1.0)
    filtered = F.conv2d(padded, kernels[:, None], groups=n)
    return filtered.reshape(colours, frames, n, height, width).permute(2, 0, 1, 3, 4)


def blur(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur with a Gaussian."""
    sigma = (BLUR_PIXELS * strength).clamp(min=1e-3)[:, None]
    offset = torch.arange(-5.0, 6.0)
    line = torch.exp(-0.5 * (offset / sigma).square())
    line = line / line.sum(dim=1, keepdim=True)
    return _filter(clips, line[:, :, None] * line[:, None, :])


def noise(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add white noise, half of it shared by the three colours."""
    n, colours, *rest = clips.shape
    grey = torch.randn(n, 1, *rest, generator=generator)
    own = torch.randn(n, colours, *rest, generator=generator)
    return clips + NOISE * _expand(strength) * (grey + own) * math.sqrt(0.5)


def ghost(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blend with another of the clips, as in a double exposure."""
    other = clips.roll(1, dims=0)
    return clips + GHOST_SHARE * _expand(strength) * (other - clips)


def flicker(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Dim each frame by a different amount."""
    n, _, frames, _, _ = clips.shape
    lost = torch.rand(n, 1, frames, 1, 1, generator=generator)
    lost = lost / lost.amax(dim=2, keepdim=True)
    return (clips + 1.0) * (1.0 - FLICKER * _expand(strength) * lost) - 1.0


def erase(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Break strokes: put a soft black disc on the ink of every frame, at positions that differ between frames."""
    n, _, frames, height, width = clips.shape
    ink = clips.mean(dim=1).reshape(n * frames, height * width) + 1.0 + 1e-4
    centre = torch.multinomial(ink.clamp(min=1e-4), 1, generator=generator)[:, 0]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((y - (centre // width)[:, None, None]).square() + (x - (centre % width)[:, None, None]).square()).sqrt()
    radius = (ERASED_PIXELS * strength).repeat_interleave(frames)[:, None, None]
    mask = torch.sigmoid(2.0 * (distance - radius)).where(radius > 0, torch.ones(()))
    return (clips + 1.0) * mask.reshape(n, 1, frames, height, width) - 1.0


def smear(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur along a random direction, as by motion."""
    n = len(clips)
    angle = torch.rand(n, generator=generator)[:, None, None] * torch.pi
    y, x = torch.meshgrid(torch.arange(-4.0, 5.0), torch.arange(-4.0, 5.0), indexing="ij")
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    half = (0.5 * SMEAR_PIXELS * strength)[:, None, None]
    kernel = (half + 0.5 - along.abs()).clamp(0.0, 1.0) * (1.0 - across.abs()).clamp(0.0, 1.0)
    centre = torch.zeros(9, 9)
    centre[4, 4] = 1.0
    kernel = (kernel / kernel.sum(dim=(1, 2), keepdim=True)).where(half > 0, centre)
    return _filter(clips, kernel)


def warp(clips: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Wobble: bend every frame by its own smooth displacement field."""
    n, colours, frames, height, width = clips.shape
    coarse = torch.randn(n * frames, 2, 6, 6, generator=generator)
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    pixels = WARP_PIXELS * strength.repeat_interleave(frames)[:, None, None, None]
    straight = F.affine_grid(torch.eye(2, 3).expand(n * frames, -1, -1), [n * frames, 1, height, width], False)
    grid = straight + (field * pixels).permute(0, 2, 3, 1) * (2.0 / width)
    pictures = clips.transpose(1, 2).reshape(n * frames, colours, height, width) + 1.0
    bent = F.grid_sample(pictures, grid, mode="bilinear", align_corners=False) - 1.0
    return bent.reshape(n, frames, colours, height, width).transpose(1, 2)


DAMAGES: tuple[Damage, ...] = (blur, noise, ghost, flicker, erase, smear, warp)


def damage(clips: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Damage clips at random, and return them with their remaining quality.

    A quarter of the clips stays clean; the others get one or two kinds of damage, each of a strength uniform in [0, 1].

    Args:
        clips: clips [n, 3, frames, height, width] in [-1, 1].
        generator: source of the random numbers.

    Returns:
        The damaged clips, in [-1, 1], and their quality [n]: the product over the damages of (1 - strength).
    """
    n = len(clips)
    count = torch.tensor([0, 1, 1, 2])[torch.randint(4, (n,), generator=generator)]
    order = torch.rand(n, len(DAMAGES), generator=generator).argsort(dim=1).argsort(dim=1)
    strength = torch.rand(n, len(DAMAGES), generator=generator) * (order < count[:, None])
    for index, apply in enumerate(DAMAGES):
        damaged = strength[:, index].nonzero()[:, 0]
        if len(damaged):
            clips = clips.index_copy(0, damaged, apply(clips[damaged], strength[damaged, index], generator))
    return clips.clamp(-1.0, 1.0), (1.0 - strength).prod(dim=1)
