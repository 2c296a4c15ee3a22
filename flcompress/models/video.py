"""Clips to unit-scale latents and back, as the stock pipelines do it."""

from __future__ import annotations

from typing import Any

import torch

from flcompress.models.tiling import make_room


def _scale(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) of raw latents: a channel each (Wan, LTX, Mochi, QwenImage) or one number for all."""
    config, shape = vae.config, (1, -1, *([1] * (like.ndim - 2)))
    buffers = dict(vae.named_buffers(recurse=False))

    def number(name: str) -> Any:
        value = buffers.get(name, config.get(name))  # LTX keeps its statistics as buffers
        return None if value is None else torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(shape)

    mean, deviation = number("latents_mean"), number("latents_std")
    if mean is None or deviation is None:
        mean = torch.as_tensor(config.get("shift_factor") or 0.0, dtype=like.dtype, device=like.device)
        deviation = torch.ones_like(mean)
    return mean, deviation / (config.get("scaling_factor") or 1.0)


def _pictures(vae: Any) -> bool:
    """Whether the autoencoder codes single pictures [n, channels, height, width]."""
    return type(vae).__name__ == "AutoencoderKL"


@torch.no_grad()
def encode_clips(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Clips [n, 3, frames, height, width] in [-1, 1] to unit-scale latents [n, channels, frames', height', width']."""
    given = (clips[:, :, 0] if _pictures(vae) else clips).to(vae.dtype)
    make_room(vae, given, "encode")
    latents: torch.Tensor = vae.encode(given).latent_dist.mode()
    mean, deviation = _scale(vae, latents)
    scaled = (latents - mean) / deviation
    return scaled[:, :, None] if _pictures(vae) else scaled


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Unit-scale latents to clips [n, 3, frames, height, width] in [-1, 1]."""
    given = latents[:, :, 0] if _pictures(vae) else latents
    mean, deviation = _scale(vae, given)
    raw = (given * deviation + mean).to(vae.dtype)
    timestep = (raw.new_zeros(len(raw)),) if vae.config.get("timestep_conditioning") else ()
    make_room(vae, raw, "decode", *timestep)
    clips = vae.decode(raw, *timestep).sample.clamp(-1.0, 1.0)
    return clips[:, :, None] if _pictures(vae) else clips  # type: ignore[no-any-return]
