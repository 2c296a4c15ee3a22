"""Two experts that share the noise levels: Wan 2.2 A14B's high-noise and low-noise transformers."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flcompress.diffusion.schedulers import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    import torch

    from flcompress.diffusion.network import Conditioning, Network

Expert = Literal["high", "low"]

COMPONENTS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
"""The stock pipeline's names of the two transformers."""

OTHER: dict[Expert, Expert] = {"high": "low", "low": "high"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The noise levels that each expert handles, as the stock pipeline decides it.

    Attributes:
        boundary_ratio: share of the training timesteps below which the low-noise expert is called.
        compressed: the expert that passes rewrite; the other, its partner, stays as it is.
        guidance_scale: w of the low-noise expert; the contract's own is the high-noise expert's.
        partner_steps: steps that the partner was distilled for by an earlier recipe; None if it is the teacher's.
    """

    boundary_ratio: float
    compressed: Expert
    guidance_scale: float
    partner_steps: int | None = None

    @property
    def boundary(self) -> float:
        """Lowest timestep of the high-noise expert."""
        return self.boundary_ratio * NUM_TRAIN_TIMESTEPS

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level of the compressed expert."""
        return (self.boundary_ratio, 1.0) if self.compressed == "high" else (0.0, self.boundary_ratio)

    def at(self, timestep: torch.Tensor | float) -> Expert:
        """Return the expert that is called at a timestep; all samples of a batch have the same.

        Stock schedulers keep timesteps in fp32, so that is where they are compared with the boundary.
        """
        first = timestep if isinstance(timestep, int | float) else timestep.flatten()[0]
        return "high" if _fp32(float(first)) >= _fp32(self.boundary) else "low"

    def combine(self, compressed: Network, partner: Network) -> Network:
        """Return both experts as one network, as a sampler calls it."""

        def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            return (compressed if self.at(timestep) == self.compressed else partner)(x, timestep, conditioning)

        return call


def _fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
