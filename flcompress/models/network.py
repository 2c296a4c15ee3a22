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
        transformer: of a class that a family knows.
        guidance: embedded guidance scale, where the network is told one; the family's usual one where None.
    """
    inner = getattr(transformer, "_orig_mod", transformer)  # torch.compile's wrapper hides the class
    family, config = family_of(type(inner).__name__), inner.config

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        given = family.arguments(config, x, timestep, conditioning, guidance)
        output = transformer(**given, return_dict=False)[0]
        return family.prediction(config, output, x, timestep, conditioning)

    return call
