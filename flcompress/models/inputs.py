"""Example forward arguments of a transformer, for tracing and certificates."""

from __future__ import annotations

from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.families import FAMILIES, family_of
from flcompress.models.families.family import LatentShape

SMALL_LATENTS = (3, 8, 8)
"""(frames, height, width) of latents where nothing asks for others: the embedded benchmark's."""

FP32_ARGUMENTS = ("timestep", "guidance", "image_rotary_emb", "img_ids", "txt_ids", "video_coords")
"""Forward arguments that no precision rounds: bf16 makes 6016 of a timestep of 6000."""


def example_inputs(
    model: Any, *, batch: int = 1, latent_shape: LatentShape | None = None, tokens: int = 16
) -> dict[str, Any]:
    """Random inputs on the model's own device (meta for a meta model).

    Args:
        model: a transformer of a known family.
        batch: samples.
        latent_shape: (frames, height, width) of the latents; image models take one frame of it. None: as few as any
            model takes, or those that its learned positions are for.
        tokens: length of the text.

    Raises:
        ModelError: a class for which no example inputs are known; pass `inputs` instead.
    """
    name = type(model).__name__
    if not any(name in family.transformers for family in FAMILIES):
        known = ", ".join(name for family in FAMILIES for name in family.transformers)
        raise ModelError(
            f"{name}: no example inputs are known for this class; expected {known}, "
            "or pass inputs={argument name: tensor}"
        )
    family, config = family_of(name), model.config
    parameter = next(model.parameters())
    shape = latent_shape or family.fixed_latents(config) or SMALL_LATENTS
    frames = shape[0] + -shape[0] % family.patch(config)[0]  # as pipelines pad
    shape = (1 if family.image else frames, *shape[1:])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, family.channels(config), *shape, generator=draw)
    given = family.example_conditioning(config, batch, shape, tokens, draw)
    timestep = torch.linspace(900.0, 100.0, batch)
    return {
        key: _placed(key, one, parameter) for key, one in family.arguments(config, x, timestep, given, None).items()
    }


def _placed(name: str, value: Any, like: torch.Tensor) -> Any:
    """On the model's device and, the numbers that must not be rounded aside, in its dtype."""
    if isinstance(value, tuple | list):
        return type(value)(_placed(name, one, like) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    cast = value.is_floating_point() and name not in FP32_ARGUMENTS
    return value.to(device=like.device, dtype=like.dtype if cast else value.dtype)
