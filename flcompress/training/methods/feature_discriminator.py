"""A discriminator of a denoiser's features: one head looks at each frame, the other along time at each place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flcompress.training.shared_base import width

WIDTH = 128
"""Channels inside a head."""


class FeatureDiscriminator(nn.Module):
    """Tell a teacher's features from a student's (Wu et al. 2025, ICMD, the multi-frame content adversarial loss).

    Args:
        channels: width of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = Head(channels, (1, 3, 3))
        self.temporal = Head(channels, (3, 1, 1))

    def forward(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return logits, positive for the teacher's: of each frame's surroundings, and along time at each place.

        Args:
            features: [n, channels, frames, rows, columns].
            level: noise levels [n] of the clips that they are of.

        Returns:
            [n, 2, frames, rows, columns].
        """
        return torch.cat([self.spatial(features, level), self.temporal(features, level)], dim=1)


class Head(nn.Module):
    """A convolution over rows and columns, or over frames, scaled and shifted by the noise level.

    Args:
        channels: width of the features.
        kernel: extent over (frames, rows, columns).
    """

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.narrow = nn.Conv3d(channels, WIDTH, 1)
        self.level = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.mix = nn.Conv3d(WIDTH, WIDTH, kernel, padding=(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2))
        self.judge = nn.Conv3d(WIDTH, 1, 1)

    def forward(self, features: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 1, frames, rows, columns]; see `FeatureDiscriminator.forward`."""
        scale, shift = self.level(level[:, None])[..., None, None, None].chunk(2, dim=1)
        hidden = self.mix(F.silu(self.narrow(features)))
        logits: torch.Tensor = self.judge(F.silu(hidden * (1.0 + scale) + shift))
        return logits


def student_term(logits: torch.Tensor) -> torch.Tensor:
    """Return what the student minimises: -D(student)."""
    return -logits.mean()


def discriminator_term(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """Return what the discriminator minimises, the hinge loss: max(0, 1 - D(teacher)) + max(0, 1 + D(student))."""
    return F.relu(1.0 - teacher_logits).mean() + F.relu(1.0 + student_logits).mean()


def discriminator_parameters(parameters: float, blocks: float) -> float:
    """Estimate the size of a discriminator of a transformer's features, for the plan."""
    return 2.0 * width(parameters, blocks) * WIDTH + (9.0 + 3.0 + 2.0 * 2.0) * WIDTH**2
