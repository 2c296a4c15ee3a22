"""Features of clips that no training ever saw: two random convolutions, the same for everyone.

A generator that pleases the trained classifier has to please these as well. Random convolutions keep what a clip looks
like (edges, strokes and their motion at three pixels' and seven pixels' reach) and name nothing in it. Mean and maximum
over space and time make them independent of where the digit is, as a distance of sets of clips should be.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from flcompress.draws import generator

FEATURES = 48
"""As many as the classifier has, so that both distances have the same bias at the same number of clips."""

_WIDTHS = (1, 16, FEATURES // 2)
_STRIDES = ((1, 1, 1), (1, 2, 2))


@cache
def _weights() -> tuple[torch.Tensor, ...]:
    """Return the kernels [out, in, 3, 3, 3], of mean 0 each, so that black ground, -1 everywhere, gives 0 inside."""
    draw = generator("moving-digits", "fixed features")
    kernels = []
    for width_in, width_out in pairwise(_WIDTHS):
        kernel = torch.randn(width_out, width_in, 3, 3, 3, generator=draw)
        kernel = kernel - kernel.mean(dim=(1, 2, 3, 4), keepdim=True)
        kernels.append(kernel / kernel.flatten(1).norm(dim=1)[:, None, None, None, None])
    return tuple(kernels)


@torch.no_grad()
def fixed_features(clips: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Return features [n, 48] of clips [n, 3, frames, height, width] in [-1, 1]."""
    parts = []
    for part in torch.split(clips, batch):
        x = (part.mean(dim=1, keepdim=True) + 1.0) / 2.0
        for kernel, stride in zip(_weights(), _STRIDES, strict=True):
            x = torch.relu(F.conv3d(x, kernel, stride=stride, padding=1))
        parts.append(torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1))
    return torch.cat(parts)
