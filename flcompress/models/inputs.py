"""Example forward arguments of a transformer, for tracing and certificates."""

from __future__ import annotations

from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.families import find_family, known_families
from flcompress.models.families.family import LatentShape

SMALL_LATENTS = (3, 8, 8)
"""(frames, height, width) of latents by default: the embedded benchmark's."""


def example_inputs(
    model: Any, *, batch: int = 1, latent_shape: LatentShape | None = None, tokens: int = 16
) -> dict[str, Any]:
    """Draw random inputs on the model's own device (meta for a meta model).

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
    family = find_family(name)
    if family is None:
        known = ", ".join(name for family in known_families() for name in family.transformers)
        raise ModelError(
            f"{name}: no example inputs are known for this class; expected {known}, "
            "or pass inputs={argument name: tensor}"
        )
    config, parameter = model.config, next(model.parameters())
    shape = latent_shape or family.fixed_latents(config) or SMALL_LATENTS
    frames = shape[0] + -shape[0] % family.patch(config)[0]  # as pipelines pad
    shape = (1 if family.image else frames, *shape[1:])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, family.channels(config), *shape, generator=draw)
    conditioning = family.example_conditioning(config, batch, shape, tokens, draw)
    timestep = torch.linspace(900.0, 100.0, batch)
    arguments = family.arguments(config, x, timestep, conditioning, None)
    return {key: _like(parameter, value, cast=key not in family.fp32_arguments) for key, value in arguments.items()}


def small_config(model: Any) -> dict[str, Any]:
    """Return the config changes with which a model takes example inputs of the usual small size."""
    family = find_family(type(model).__name__)
    return family.small_positions(model.config) if family else {}


def _like(parameter: torch.Tensor, value: Any, *, cast: bool) -> Any:
    """Return `value`, its tensors on the parameter's device; with `cast`, floating ones in its dtype."""
    if isinstance(value, tuple | list):
        return type(value)(_like(parameter, element, cast=cast) for element in value)
    if not isinstance(value, torch.Tensor):
        return value
    cast = cast and value.is_floating_point()
    return value.to(device=parameter.device, dtype=parameter.dtype if cast else value.dtype)
