"""The benchmark's figures, as pure functions of clips and of the classifier's judgement.

Clips are [n, 3, frames, height, width] in [-1, 1] on black ground; positions are in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flcompress.stats import frechet_distance

GROUND = 0.1
"""Brightness, of 1, that still counts as ground: the faint haze of a decoder must not pull the centroid."""

SMOOTHNESS_PIXELS = 4.0
"""Mean acceleration, in pixels per frame per frame, at which motion smoothness has fallen to 1/e.

Thin strokes drawn between pixels move the centroid of a real clip by a quarter pixel, so real clips reach 0.95, not 1;
jitter of one pixel (about 3 pixels of acceleration) costs half.
"""

DYNAMIC_PIXELS = 3.0
"""A clip whose centroid ends further than this from where it began moves. The slowest real clip goes 5.4 pixels."""

AVERAGED = ("digit_accuracy", "direction_accuracy", "motion_smoothness", "dynamic_degree", "imaging_quality")
"""What `average` is the mean of."""


def centroids(clips: torch.Tensor) -> torch.Tensor:
    """Return the centre of the ink in each frame: [n, frames, (y, x)] in pixels.

    A frame without ink has the centre of the last frame that had some (of the first one, before any), so that a digit
    that vanishes does not count as moving; a clip without any has the middle of the picture.
    """
    frames, height, width = clips.shape[2:]
    ink = ((clips.double().mean(dim=1) + 1.0) / 2.0 - GROUND).clamp(min=0.0)
    mass = ink.sum(dim=(2, 3))
    y = (ink.sum(dim=3) * torch.arange(height)).sum(dim=2)
    x = (ink.sum(dim=2) * torch.arange(width)).sum(dim=2)
    seen = mass > 1e-6
    positions = torch.stack([y, x], dim=2) / mass.where(seen, torch.ones(()).double())[:, :, None]
    middle = torch.tensor([(height - 1) / 2.0, (width - 1) / 2.0], dtype=torch.float64)
    positions = positions.where(seen[:, :, None], middle)
    last = torch.where(seen, torch.arange(frames), -1).cummax(dim=1).values
    first = seen.int().argmax(dim=1, keepdim=True)
    return positions.gather(1, torch.maximum(last, first)[:, :, None].expand(-1, -1, 2))


def motion_smoothness(clips: torch.Tensor) -> torch.Tensor:
    """exp(-mean_f |c_(f+1) - 2 c_f + c_(f-1)| / 4 pixels) of the centroids c: [n] in [0, 1], 1 for uniform motion.

    Clips of fewer than three frames have no acceleration: 1.
    """
    positions = centroids(clips)
    if positions.shape[1] < 3:
        return torch.ones(len(clips), dtype=torch.float64)
    acceleration = torch.linalg.vector_norm(positions[:, 2:] - 2.0 * positions[:, 1:-1] + positions[:, :-2], dim=2)
    return torch.exp(-acceleration.mean(dim=1) / SMOOTHNESS_PIXELS)


def moves(clips: torch.Tensor) -> torch.Tensor:
    """Return whether the centroid's last position is more than `DYNAMIC_PIXELS` from its first: bool [n]."""
    positions = centroids(clips)
    distance: torch.Tensor = torch.linalg.vector_norm(positions[:, -1] - positions[:, 0], dim=1)
    return distance > DYNAMIC_PIXELS


def identity(shown: torch.Tensor) -> torch.Tensor:
    """Return the share of each clip's frames that show the clip's most frequent digit: [n] in (0, 1].

    Args:
        shown: the digits that the frames show [n, frames].
    """
    return (shown == shown.mode(dim=1).values[:, None]).double().mean(dim=1)


def benchmark_figures(judged: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return all figures of one set of clips.

    Args:
        judged: per clip, all [n] but the features: "features" [n, D], "fixed_features" [n, E], "digit", "direction" and
            "speed" (bool: as the prompt says), "smoothness", "quality" and "identity" in [0, 1], "moves" (bool).
        reference: both kinds of features, of real clips [m, D] and [m, E].
    """
    share = {name: float(judged[name].double().mean()) for name in judged if not name.endswith("features")}
    scale = reference["fixed_features"].double().std(dim=0)  # the classifier's have variance one already
    measured = {
        "frechet": frechet_distance(judged["features"], reference["features"]),
        "prompt_accuracy": float((judged["digit"].bool() & judged["direction"].bool()).double().mean()),
        "digit_accuracy": share["digit"],
        "direction_accuracy": share["direction"],
        "speed_accuracy": share["speed"],
        "motion_smoothness": share["smoothness"],
        "dynamic_degree": share["moves"],
        "imaging_quality": share["quality"],
    }
    return {
        **measured,
        "average": sum(measured[name] for name in AVERAGED) / len(AVERAGED),
        "identity": share["identity"],
        "frechet_fixed": frechet_distance(judged["fixed_features"] / scale, reference["fixed_features"] / scale),
    }
