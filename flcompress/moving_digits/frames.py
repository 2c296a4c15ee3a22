"""A judge of single frames: which digit each frame of a clip shows, and whether it stays the same one.

A clip's own judgement pools over time, and a three that ends as a two can pass it. Here every frame is read alone. The
fixed classifier knows only digits that move, so a frame is made to: its picture, centred and rigid, drifts across a
clip of its own, as real handwriting does. Read that way, 98 % of the frames of real held-out clips are their digit.
"""

from __future__ import annotations

import torch

from flcompress.moving_digits import digits
from flcompress.moving_digits.classifier import Classifier, judge
from flcompress.moving_digits.figures import centroids

DRIFT_PIXELS = 1
"""Drift of a frame's own clip, to the right, in pixels per frame: between the benchmark's slow and fast."""


def drifting(clips: torch.Tensor) -> torch.Tensor:
    """Return a clip for each frame of `clips`: that frame's picture alone, on its way across the middle.

    Args:
        clips: clips [n, 3, frames, height, width] in [-1, 1] on black ground.

    Returns:
        Clips [n * frames, 3, FRAMES, height, width]; what comes in from outside the picture is ground.
    """
    n, colours, frames, height, width = clips.shape
    pictures = clips.transpose(1, 2).reshape(n * frames, colours, height, width)
    y, x = centroids(clips).reshape(n * frames, 2).round().long().unbind(1)
    time = DRIFT_PIXELS * (torch.arange(digits.FRAMES) - digits.FRAMES // 2)
    rows = y[:, None] + torch.arange(height) - height // 2  # [n * frames, height]
    columns = x[:, None, None] + torch.arange(width) - width // 2 - time[:, None]  # [n * frames, FRAMES, width]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, :, None, :]
    every = torch.arange(n * frames)[:, None, None, None]
    moved = pictures.permute(0, 2, 3, 1)[
        every, rows.clamp(0, height - 1)[:, None, :, None], columns.clamp(0, width - 1)[:, :, None, :]
    ]  # [n * frames, FRAMES, height, width, 3]
    return moved.where(inside[..., None], -1.0).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def frame_digits(classifier: Classifier, clips: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Return the digit that each frame shows: [n, frames], of clips [n, 3, frames, height, width]."""
    parts = [
        judge(classifier, drifting(part)).digit.argmax(dim=1).reshape(len(part), -1)
        for part in torch.split(clips, batch)
    ]
    return torch.cat(parts)
