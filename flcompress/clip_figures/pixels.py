"""Figures of a clip's pixels: flicker, colour, sharpness, noise, clipping, and how alike two pictures are.

Frames are uint8 [frames, height, width, 3], RGB.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from flcompress.clip_figures import Frames

Grey = np.ndarray[Any, np.dtype[np.float64]]
"""[height, width], 0 to 255."""

BLACK, WHITE = 2, 253
"""Values that count as clipped: compression moves 0 and 255 by a step or two."""

WINDOW, DEVIATION = 11, 1.5
"""The window of SSIM (Wang et al. 2004)."""

PEAK = 100.0
"""PSNR in dB of two equal pictures, which would be infinite."""

_NOISE = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])


def flicker(frames: Frames) -> float | None:
    """(255 - mean |frame - next|)/255, VBench's temporal flickering exactly; None for a single frame."""
    if len(frames) < 2:
        return None
    changes = [float(cv2.absdiff(a, b).mean()) for a, b in pairwise(frames)]
    return (255.0 - float(np.mean(changes))) / 255.0


def colour(frames: Frames) -> dict[str, float]:
    """Return saturation (mean and 95th percentile of HSV's S, 0 to 1) and contrast (deviation of grey, 0 to 1)."""
    values = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[..., 1] for frame in frames]
    saturation = np.stack(values)
    contrast = [float(grey(frame).std()) for frame in frames]
    return {
        "saturation": float(saturation.mean()) / 255.0,
        "saturation_p95": float(np.percentile(saturation, 95)) / 255.0,
        "contrast": float(np.mean(contrast)) / 255.0,
    }


def imaging(frames: Frames) -> dict[str, float]:
    """Return sharpness, noise and clipping, means over the frames.

    sharpness is the variance of the Laplacian; noise the deviation of white noise after Immerkaer (1996); clipping the
    share of values that are black or white.
    """
    rows = [(sharpness(picture), noise(picture)) for picture in map(grey, frames)]
    return {
        "sharpness": float(np.mean([row[0] for row in rows])),
        "noise": float(np.mean([row[1] for row in rows])),
        "clipping": float(((frames <= BLACK) | (frames >= WHITE)).mean()),
    }


def sharpness(picture: Grey) -> float:
    """Return the variance of the Laplacian."""
    return float(cv2.Laplacian(picture, cv2.CV_64F).var())


def noise(picture: Grey) -> float:
    """Return the deviation of white noise in a picture, after Immerkaer; 0 for one too small for the filter."""
    height, width = picture.shape
    if min(height, width) < 3:
        return 0.0
    filtered = cv2.filter2D(picture, cv2.CV_64F, _NOISE)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2.0) * np.abs(filtered).mean() / 6.0)


def psnr(a: Frames, b: Frames) -> float:
    """Return the peak signal-to-noise ratio in dB of two pictures or clips of one size; `PEAK` for equal ones."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return PEAK if error == 0.0 else min(PEAK, 10.0 * float(np.log10(255.0**2 / error)))


def ssim(a: Frames, b: Frames) -> float:
    """Return the structural similarity of the grey values of two pictures [height, width, 3]."""
    x, y = grey(a), grey(b)

    def mean(values: Grey) -> Grey:
        return np.asarray(cv2.GaussianBlur(values, (WINDOW, WINDOW), DEVIATION), dtype=np.float64)

    first, second = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    above = (2.0 * mean_x * mean_y + first) * (2.0 * covariance + second)
    below = (mean_x**2 + mean_y**2 + first) * (variance_x + variance_y + second)
    return float((above / below).mean())


def grey(frame: Frames) -> Grey:
    """Return the grey values of a frame."""
    return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float64)
