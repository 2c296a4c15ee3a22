"""A stock transformer as the plain network function that objectives, samplers and exporters know."""

from __future__ import annotations

from typing import Any

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.diffusion.sampling import Network
from flcompress.models.families import family_of


def as_network(transformer: Any, guidance: float | None = None) -> Network:
    """The transformer behind its family's adapter.

    Args:
        transformer: of a class that a family knows, or what an engine wrapped around one.
        guidance: embedded guidance scale, where the network is told one; the family's usual one where None.
    """
    inner = stock_model(transformer)
    family, config = family_of(stock_name(inner)), inner.config

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        given = family.arguments(config, x, timestep, conditioning, guidance)
        output = transformer(**given, return_dict=False)[0]
        return family.prediction(config, output, x, timestep, conditioning)

    return call


def stock_model(wrapped: Any) -> Any:
    """The stock model inside what torch.compile, DistributedDataParallel or DeepSpeed made of it, or under a LoRA."""
    for name in ("_orig_mod", "module", "inner"):
        inner = vars(wrapped).get("_modules", {}).get(name)
        if inner is None:
            inner = vars(wrapped).get(name)
        if inner is not None:
            return stock_model(inner)
    return wrapped


def stock_name(model: Any) -> str:
    """Name of its stock class; fully_shard gives a model a class of its own."""
    return next((one.__name__ for one in type(model).__mro__ if one.__module__.startswith("diffusers.")), "")
