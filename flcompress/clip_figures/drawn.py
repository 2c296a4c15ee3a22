"""What the clips that a training draws look like: motion, saturation and diversity, by the figures of `proxies`."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from flcompress.clip_figures import Frames
from flcompress.clip_figures.features import clip_features
from flcompress.clip_figures.motion import JUDGED_RATE, motion
from flcompress.clip_figures.pixels import colour

SIDE = 128
"""Pixels of the shorter side at which clips are looked at: enough for motion and colour, at a fraction of the time."""


def reduced(frames: Frames) -> Frames:
    """Return a clip whose shorter side has `SIDE` pixels at most."""
    height, width = frames.shape[1:3]
    if min(height, width) <= SIDE:
        return frames
    scale = SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    smaller = [cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack([np.asarray(frame, dtype=np.uint8) for frame in smaller])


def clip_means(clips: Sequence[Frames]) -> dict[str, float]:
    """Return flow and saturation, means over the clips, and diversity, the mean distance between them.

    flow is from each frame to the next, whatever the frame rate; pictures have none, and one clip has no diversity.

    Args:
        clips: at least one.
    """
    moved = [found.flow for clip in clips if (found := motion(clip, JUDGED_RATE)) is not None]
    vectors = [clip_features(clip) for clip in clips]
    distances = [float(np.linalg.norm(a - b)) for index, a in enumerate(vectors) for b in vectors[:index]]
    figures = {"flow": moved, "saturation": [colour(clip)["saturation"] for clip in clips], "diversity": distances}
    return {name: float(np.mean(values)) for name, values in figures.items() if values}
