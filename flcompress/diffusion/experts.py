"""Two experts that share the noise levels: Wan 2.2 A14B's high-noise and low-noise transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from flcompress.diffusion.process import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from flcompress.diffusion.conditioning import Conditioning
    from flcompress.diffusion.sampling import Network

Expert = Literal["high", "low"]

COMPONENTS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
"""What the stock pipeline calls them."""

OTHER: dict[Expert, Expert] = {"high": "low", "low": "high"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Who answers for which noise level, as the stock pipeline decides it.

    Attributes:
        boundary_ratio: share of the training timesteps below which the low-noise expert answers.
        compressed: the one that passes rewrite; the other, its partner, stays as it is.
        guidance_scale: w of the low-noise expert; the contract's own is the high-noise one's.
        partner_steps: steps that the partner was distilled for by an earlier recipe; None where it is the teacher's.
    """

    boundary_ratio: float
    compressed: Expert
    guidance_scale: float
    partner_steps: int | None = None

    @property
    def boundary(self) -> float:
        """Timestep from which on, upward, the high-noise expert answers."""
        return self.boundary_ratio * NUM_TRAIN_TIMESTEPS

    @property
    def levels(self) -> tuple[float, float]:
        """The noise levels of the compressed expert, lowest and highest."""
        return (self.boundary_ratio, 1.0) if self.compressed == "high" else (0.0, self.boundary_ratio)

    def at(self, timestep: torch.Tensor | float) -> Expert:
        """Who answers at a timestep, fp32 as the stock scheduler has them; all samples of a batch stand at one."""
        one = torch.as_tensor(timestep, dtype=torch.float32).flatten()[0]
        return "high" if bool(one >= self.boundary) else "low"

    def joined(self, compressed: Network, partner: Network) -> Network:
        """Both as the one network that a sampler knows."""

        def call(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
            return (compressed if self.at(timestep) == self.compressed else partner)(x, timestep, given)

        return call
