"""Conversions of latents, tokens and frames that several families share."""

from __future__ import annotations

from typing import Any

import torch


def normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    """Draw random numbers for examples."""
    return torch.randn(shape, generator=draw)


def even_sigmas(steps: int) -> list[float]:
    """Return 1, (N-1)/N ... 1/N."""
    return [(steps - step) / steps for step in range(steps)]


def with_first(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return `x` [n, channels, frames, height, width] with its first frames replaced by those of `first`."""
    return torch.cat([first.to(x.dtype), x[:, :, first.shape[2] :]], dim=2)


def velocity_to(first: torch.Tensor, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return a flow network's `output` with, in the first frames, the velocity that leads exactly to `first`.

    So no loss and no sampler has to know of given frames.
    """
    level = (timestep / 1000.0).clamp(min=1e-3).reshape(-1, 1, 1, 1, 1)
    return with_first(output, (x[:, :, : first.shape[2]] - first.to(x.dtype)) / level)


def picture_of(clip: torch.Tensor) -> Any:
    """Return the first frame of a clip [3, frames, height, width] in [-1, 1] as the image that a user would give."""
    from PIL import Image

    pixels = ((clip[:, 0] + 1.0) / 2.0).clamp(0.0, 1.0)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255.0).round().byte().cpu().numpy())


def pack(x: torch.Tensor) -> torch.Tensor:
    """Return image latents [n, c, 1, h, w] as tokens [n, h/2 w/2, 4 c] of 2 x 2 patches (Flux, QwenImage)."""
    n, c, _, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Invert `pack`, to the shape of `like`."""
    n, c, _, h, w = like.shape
    return tokens.reshape(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, 1, h, w)


def pad_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Return [n, tokens, ...] padded with zeros after the last token to at least `length` tokens."""
    missing = length - tokens.shape[1]
    return tokens if missing <= 0 else torch.cat([tokens, tokens.new_zeros(len(tokens), missing, *tokens.shape[2:])], 1)
