"""DMD2's optional adversarial term: classify real and generated samples by the fake score's own features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flcompress.diffusion.network import Conditioning, Network


class Discriminator(nn.Module):
    """A head on the token features of the fake score's middle block (Yin et al. 2024, DMD2, section 4.3).

    It owns the fake score, so that one optimiser trains both.

    Args:
        score: the fake score, a transformer whose block returns tokens [n, tokens, channels].
        network: the same transformer as a network.
        path: module path of the block whose (first) output is the feature.
        channels: width of the block's tokens.
    """

    def __init__(self, score: Any, network: Network, path: str, channels: int) -> None:
        super().__init__()
        self.score = score
        self._network = network
        self.head = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1)
        )
        self._features: torch.Tensor | None = None
        score.get_submodule(path).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._features = output[0] if isinstance(output, tuple) else output

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the score's prediction, logits [n], positive for real) of noised latents."""
        prediction = self._network(x, timestep, conditioning)
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError("the block that the discriminator reads did not run")
        return prediction, self.head(features.float().mean(dim=1)).squeeze(-1)


def generator_term(generated_logits: torch.Tensor) -> torch.Tensor:
    """Return what the generator minimises: softplus(-D(x_g))."""
    return F.softplus(-generated_logits).mean()


def critic_term(real_logits: torch.Tensor, generated_logits: torch.Tensor) -> torch.Tensor:
    """Return what the discriminator minimises: softplus(-D(x)) + softplus(D(x_g))."""
    return F.softplus(-real_logits).mean() + F.softplus(generated_logits).mean()
