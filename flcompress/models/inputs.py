"""Example forward arguments of a transformer, for tracing and certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flcompress.errors import ModelError

if TYPE_CHECKING:
    import torch


def example_inputs(
    model: Any, *, batch: int = 1, latent_shape: tuple[int, int, int] = (3, 8, 8), tokens: int = 16
) -> dict[str, torch.Tensor]:
    """Random inputs on the model's own device (meta for a meta model).

    Args:
        model: a `WanTransformer3DModel`.
        batch: samples.
        latent_shape: (frames, height, width) of the latents.
        tokens: length of the text.

    Raises:
        ModelError: a class for which no example inputs are known; pass `inputs` instead.
    """
    import torch

    name = type(model).__name__
    if name != "WanTransformer3DModel":
        raise ModelError(
            f"{name}: no example inputs are known for this class; expected WanTransformer3DModel, "
            "or pass inputs={argument name: tensor}"
        )
    config = model.config
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(0)
    made = {
        "hidden_states": torch.randn(batch, config.in_channels, *latent_shape, generator=draw),
        "timestep": torch.linspace(900.0, 100.0, batch),
        "encoder_hidden_states": torch.randn(batch, tokens, config.text_dim, generator=draw),
    }
    if config.image_dim is not None:
        made["encoder_hidden_states_image"] = torch.randn(batch, 4, config.image_dim, generator=draw)
    return {
        k: v.to(device=parameter.device, dtype=torch.float32 if k == "timestep" else parameter.dtype)
        for k, v in made.items()
    }
