"""Guidance, in one convention: x = u + w (c - u), so that w = 1 is no guidance.

Other projects write c + w (c - u); their w is ours minus one (`from_conditional_convention`).
"""

from __future__ import annotations

import torch


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance u + w (c - u) (Ho & Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)


def well_guided(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    conditional_pruned: torch.Tensor,
    inter: float | torch.Tensor,
    intra: float | torch.Tensor,
) -> torch.Tensor:
    """The well-guided teacher x_real = u + b1 (c - u) + b2 (c - c_pruned) (FastLightGen, Stage III; docs/method.md).

    Args:
        inter: b1, text guidance; a number or a tensor that broadcasts, one value a sample.
        intra: b2, the unpruned model guides away from its pruned self, as in autoguidance (Karras et al. 2024).
    """
    return unconditional + inter * (conditional - unconditional) + intra * (conditional - conditional_pruned)


def from_conditional_convention(scale: float) -> float:
    """A scale written for c + w (c - u), in ours."""
    return scale + 1.0
