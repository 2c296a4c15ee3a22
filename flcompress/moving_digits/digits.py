"""The embedded benchmark: real handwriting moving through short clips, with captions.

The digits are scikit-learn's bundled 8x8 scans (UCI, 1,797 images by 43 writers). A clip shows one digit that drifts in
one of eight directions at one of two speeds. 32 of the 160 captions are never trained on, and a quarter of the
handwriting is kept for held-out clips, so that both prompts and pictures of an evaluation are new to every model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

Split = Literal["train", "heldout"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
SPEEDS = ("slowly", "fast")
PIXELS_PER_FRAME = (0.75, 1.75)
"""Drift per frame for each of `SPEEDS`."""

FRAMES, HEIGHT, WIDTH = 9, 32, 32
FRAMES_PER_SECOND = 8.0
DIGIT_PIXELS = 14
"""Mean side of a digit; each clip's differs by up to 8 %."""

_UPSAMPLED = 32


@dataclass(frozen=True, slots=True)
class Caption:
    """Contents of a clip, as indices into `DIGITS`, `DIRECTIONS` and `SPEEDS`."""

    digit: int
    direction: int
    speed: int

    @property
    def text(self) -> str:
        """Caption as text, a prompt."""
        return f"a {DIGITS[self.digit]} drifting {DIRECTIONS[self.direction]}, {SPEEDS[self.speed]}"

    @property
    def heldout(self) -> bool:
        """Whether it is never trained on: one caption in five, spread evenly over digits, directions and speeds."""
        return (self.digit + self.direction + 2 * self.speed) % 5 == 0


@cache
def captions(split: Split) -> tuple[Caption, ...]:
    """Return the captions of a split, in a fixed order: 128 for training, 32 held out."""
    every = (Caption(d, k, s) for d in range(len(DIGITS)) for k in range(len(DIRECTIONS)) for s in range(len(SPEEDS)))
    return tuple(caption for caption in every if caption.heldout == (split == "heldout"))


@cache
def _handwriting(split: Split) -> tuple[torch.Tensor, ...]:
    """Return the scans of each digit, upsampled and with crisp edges: ten tensors [n, 32, 32] in [0, 1]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.from_numpy(scans.images).float()[:, None] / 16.0
    images = F.interpolate(images, size=(_UPSAMPLED, _UPSAMPLED), mode="bicubic", align_corners=False)[:, 0]
    images = torch.sigmoid(10.0 * (images - 0.42))
    labels = torch.from_numpy(scans.target)
    position = torch.arange(len(labels))
    chosen = (position % 4 == 3) == (split == "heldout")
    return tuple(images[chosen & (labels == digit)] for digit in range(len(DIGITS)))


def render(wanted: tuple[Caption, ...], split: Split, generator: torch.Generator) -> torch.Tensor:
    """Draw one clip for each caption.

    Args:
        wanted: the captions, one per clip.
        split: split of the handwriting.
        generator: source of handwriting, size, exact speed and starting position.

    Returns:
        Clips [n, 3, frames, height, width] in [-1, 1], black ground.
    """
    n = len(wanted)
    scans = _handwriting(split)
    ink = torch.stack([scans[c.digit][torch.randint(len(scans[c.digit]), (), generator=generator)] for c in wanted])
    scale = 1.0 + 0.08 * (2.0 * torch.rand(n, generator=generator) - 1.0)
    side = DIGIT_PIXELS * scale
    angle = torch.tensor([c.direction for c in wanted]) * (2.0 * math.pi / len(DIRECTIONS))
    speed = torch.tensor([PIXELS_PER_FRAME[c.speed] for c in wanted])
    speed = speed * (1.0 + 0.1 * (2.0 * torch.rand(n, generator=generator) - 1.0))
    step = torch.stack([angle.cos(), angle.sin()], dim=1) * speed[:, None]

    # Choose the middle of the path such that neither end leaves the picture.
    travel = step.abs() * (FRAMES - 1) / 2.0
    room = (torch.tensor([WIDTH, HEIGHT]) - side[:, None]) / 2.0 - travel
    middle = room.clamp(min=0.0) * (2.0 * torch.rand(n, 2, generator=generator) - 1.0)
    time = torch.arange(FRAMES) - (FRAMES - 1) / 2.0
    centre = middle[:, None, :] + step[:, None, :] * time[None, :, None]  # [n, frames, (x, y)], 0 is the middle

    y, x = torch.meshgrid(
        torch.arange(HEIGHT) - (HEIGHT - 1) / 2.0, torch.arange(WIDTH) - (WIDTH - 1) / 2.0, indexing="ij"
    )
    pixels = torch.stack([x, y], dim=-1)
    grid = (pixels[None, None] - centre[:, :, None, None, :]) / (side[:, None, None, None, None] / 2.0)
    source = ink[:, None].expand(n, FRAMES, -1, -1).reshape(n * FRAMES, 1, _UPSAMPLED, _UPSAMPLED)
    drawn = F.grid_sample(source, grid.reshape(n * FRAMES, HEIGHT, WIDTH, 2), mode="bilinear", align_corners=False)
    clips = drawn.reshape(n, 1, FRAMES, HEIGHT, WIDTH).expand(n, 3, FRAMES, HEIGHT, WIDTH)
    return clips * 2.0 - 1.0


def sample(
    n: int, split: Split, generator: torch.Generator, words: Split | None = None
) -> tuple[torch.Tensor, tuple[Caption, ...]]:
    """Draw `n` clips with captions uniform over a split; return clips [n, 3, frames, height, width] and captions.

    `words` is the split of the captions, by default that of the handwriting.
    """
    known = captions(words or split)
    wanted = tuple(known[int(i)] for i in torch.randint(len(known), (n,), generator=generator))
    return render(wanted, split, generator), wanted
