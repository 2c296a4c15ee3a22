"""Fixed random features of clips and frames, for distances of sets without a trained network.

A convolution network with random weights that never change keeps what its input looks like well enough to tell sets of
clips apart (Ulyanov et al. 2018 on such networks as priors). It knows no objects: its distances are no FVD.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from flcompress.clip_figures import Frames
from flcompress.draws import generator

VERSION = 1
"""Part of the generator's seed: other features are other distances."""

SIDE, FRAMES = 64, 8
"""Clips are resized to this many pixels a side, and to this many frames evenly spread."""

WIDTHS = (3, 16, 32)
THUMBNAIL = 16
"""Side of the pictures by which frames are compared with each other."""

Vector = np.ndarray[Any, np.dtype[np.float64]]


@torch.no_grad()
def clip_features(frames: Frames) -> Vector:
    """Return the features of a clip [64]: mean and maximum over space and time of two random convolutions."""
    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    small = np.stack([cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in chosen])
    x = torch.from_numpy(small).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
    for weight in _weights():
        x = F.leaky_relu(F.conv3d(x, weight, stride=(1, 2, 2), padding=1), 0.1)
    pooled = torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1)
    return np.asarray(pooled[0].double().numpy())


def relations(frames: Frames) -> Vector:
    """Return the cosines of every two frames' thumbnails, `FRAMES` of them evenly spread: [FRAMES^2].

    They say how far frames are from each other over time, and nothing of what they show.
    """
    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    rows = []
    for frame in chosen:
        thumbnail = cv2.resize(np.ascontiguousarray(frame), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        row = thumbnail.astype(np.float64).ravel()
        row = row - row.mean()
        length = float(np.linalg.norm(row))
        rows.append(row / length if length else row)
    matrix = np.stack(rows)
    return np.asarray(matrix @ matrix.T).ravel()


def latent_features(latents: torch.Tensor) -> Vector:
    """Return features [3 C] of latents [1, C, frames, height, width]: mean, deviation, change over time by channel."""
    x = latents[0].double().cpu()
    change = x.diff(dim=1).abs().mean(dim=(1, 2, 3)) if x.shape[1] > 1 else torch.zeros(len(x), dtype=x.dtype)
    return np.asarray(torch.cat([x.mean(dim=(1, 2, 3)), x.flatten(1).std(dim=1, correction=0), change]).numpy())


@cache
def _weights() -> tuple[torch.Tensor, ...]:
    draw = generator("evaluation", "random features", VERSION)
    pairs = pairwise(WIDTHS)
    return tuple(torch.randn(out, into, 3, 3, 3, generator=draw) * (2.0 / (27 * into)) ** 0.5 for into, out in pairs)
