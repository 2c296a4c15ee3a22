"""Clips to normalised latents and back, as Wan's pipelines do it."""

from __future__ import annotations

from typing import Any

import torch


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=like.dtype, device=like.device).reshape(shape)
    std = torch.tensor(vae.config.latents_std, dtype=like.dtype, device=like.device).reshape(shape)
    return mean, std


@torch.no_grad()
def encode_clips(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Clips [n, 3, frames, height, width] in [-1, 1] to unit-scale latents [n, channels, frames', height', width']."""
    latents: torch.Tensor = vae.encode(clips.to(vae.dtype)).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Unit-scale latents to clips [n, 3, frames, height, width] in [-1, 1]."""
    mean, std = _statistics(vae, latents)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.clamp(-1.0, 1.0)  # type: ignore[no-any-return]
