"""Clips to unit-scale latents and back, as the stock pipelines do it.

The autoencoder takes clips whole. Tiles, whose seams change values slightly, are for what does not fit.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

import psutil
import torch

from flcompress.models.tensor_memory import Alive, free_gpu_memory

Method = Literal["encode", "decode"]

SMALL: dict[Method, int] = {"encode": 1 << 20, "decode": 1 << 12}
"""Positions (frames x height x width) of one sample, up to which its memory is not counted."""

SPARE = 0.25
"""Share of the free memory reserved for what is not counted: workspaces of convolutions, gaps between tensors."""


def _scale(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, deviation) of raw latents: one per channel (Wan, LTX, Mochi, QwenImage) or one for all."""
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
    """Tell whether the autoencoder takes pictures [n, channels, height, width]: it never convolves over time."""
    return not any(parameter.dim() == 5 for parameter in vae.parameters())


@torch.no_grad()
def encode_clips(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Encode clips [n, 3, frames, height, width] in [-1, 1] as unit-scale latents.

    Returns:
        Latents [n, channels, frames', height', width'].
    """
    pixels = (clips[:, :, 0] if _pictures(vae) else clips).to(vae.dtype)
    make_room(vae, pixels, "encode")
    latents: torch.Tensor = vae.encode(pixels).latent_dist.mode()
    mean, deviation = _scale(vae, latents)
    scaled = (latents - mean) / deviation
    return scaled[:, :, None] if _pictures(vae) else scaled


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode unit-scale latents to clips [n, 3, frames, height, width] in [-1, 1]."""
    scaled = latents[:, :, 0] if _pictures(vae) else latents
    mean, deviation = _scale(vae, scaled)
    raw = (scaled * deviation + mean).to(vae.dtype)
    timestep = (raw.new_zeros(len(raw)),) if vae.config.get("timestep_conditioning") else ()
    make_room(vae, raw, "decode", *timestep)
    clips = vae.decode(raw, *timestep).sample.clamp(-1.0, 1.0)
    return clips[:, :, None] if _pictures(vae) else clips  # type: ignore[no-any-return]


def make_room(vae: Any, batch: torch.Tensor, method: Method, *more: torch.Tensor) -> None:
    """Have the autoencoder take samples one by one, or in tiles, if `batch` [n, channels, ...] would not fit.

    Args:
        vae: a stock autoencoder; one that knows no tiles stays as it is.
        batch: what is encoded or decoded next.
        method: which of the two.
        more: the call's other arguments.
    """
    if not hasattr(vae, "use_tiling") or batch[0, 0].numel() <= SMALL[method]:
        return
    config = json.dumps(dict(vae.config), sort_keys=True)
    shapes = tuple((tuple(tensor[:1].shape), tensor.dtype) for tensor in (batch, *more))
    sample_bytes = _most_alive(type(vae).__name__, config, method, shapes)
    room = (1.0 - SPARE) * _free_bytes(batch.device)
    vae.use_slicing = len(batch) * sample_bytes > room
    if sample_bytes > room:
        vae.enable_tiling()
    else:
        vae.disable_tiling()


@lru_cache(maxsize=64)
def _most_alive(kind: str, config: str, method: Method, shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> int:
    """Return the peak bytes of tensors alive in a call on one sample, counted on tensors that hold no memory."""
    import diffusers
    from torch._subclasses.fake_tensor import FakeTensorMode

    usual = torch.get_default_dtype()
    with FakeTensorMode(), torch.no_grad():
        try:
            torch.set_default_dtype(shapes[0][1])
            twin = getattr(diffusers, kind).from_config(json.loads(config)).eval()
        finally:
            torch.set_default_dtype(usual)
        inputs = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        alive = Alive()
        with alive:
            getattr(twin, method)(*inputs)
    return alive.most


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free_gpu_memory()
    return int(torch.cuda.mem_get_info(device)[0])
