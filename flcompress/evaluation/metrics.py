"""The benchmark's figures, as pure functions of clips, of the classifier's judgement, and of figures per seed.

Clips are [n, 3, frames, height, width] in [-1, 1] on black ground; places are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from flcompress.errors import RequestError

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


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6).

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

    The last trace is the nuclear norm of S_a^1/2 S_b^1/2: with roots from symmetric eigen-decompositions nothing turns
    complex and no small eigenvalue is squared, so rank-deficient covariances need no special care.

    Args:
        a, b: features [n, D] and [m, D], n and m at least 2.

    Raises:
        RequestError: fewer than two features in a set, or other dimensions.
    """
    for name, given in (("a", a), ("b", b)):
        if given.ndim != 2 or len(given) < 2 or given.shape[1] != a.shape[1]:
            raise RequestError(
                f"features {name}: shape {tuple(given.shape)} given, expected [n >= 2, D], the same D for both sets"
            )
    a, b = a.double(), b.double()
    root_a, root_b = _root(a), _root(b)
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    spread = root_a.square().sum() + root_b.square().sum()
    return max(0.0, float(apart + spread - 2.0 * torch.linalg.matrix_norm(root_a @ root_b, ord="nuc")))


def _root(features: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of the features' covariance; rounding below zero is cut off."""
    centred = features - features.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    root: torch.Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root


def centroids(clips: torch.Tensor) -> torch.Tensor:
    """Centre of the ink in each frame: [n, frames, (y, x)] in pixels.

    A frame without ink has the centre of the last frame that had some (of the first one, before any), so that a digit
    that vanishes does not count as moving; a clip without any has the middle of the picture.
    """
    frames, height, width = clips.shape[2:]
    ink = ((clips.double().mean(dim=1) + 1.0) / 2.0 - GROUND).clamp(min=0.0)
    mass = ink.sum(dim=(2, 3))
    y = (ink.sum(dim=3) * torch.arange(height)).sum(dim=2)
    x = (ink.sum(dim=2) * torch.arange(width)).sum(dim=2)
    seen = mass > 1e-6
    places = torch.stack([y, x], dim=2) / mass.where(seen, torch.ones(()).double())[:, :, None]
    middle = torch.tensor([(height - 1) / 2.0, (width - 1) / 2.0], dtype=torch.float64)
    places = places.where(seen[:, :, None], middle)
    last = torch.where(seen, torch.arange(frames), -1).cummax(dim=1).values
    first = seen.int().argmax(dim=1, keepdim=True)
    return places.gather(1, torch.maximum(last, first)[:, :, None].expand(-1, -1, 2))


def motion_smoothness(clips: torch.Tensor) -> torch.Tensor:
    """exp(-mean_f |c_(f+1) - 2 c_f + c_(f-1)| / 4 pixels) of the centroids c: [n] in [0, 1], 1 for uniform motion.

    Clips of fewer than three frames have no acceleration: 1.
    """
    places = centroids(clips)
    if places.shape[1] < 3:
        return torch.ones(len(clips), dtype=torch.float64)
    acceleration = torch.linalg.vector_norm(places[:, 2:] - 2.0 * places[:, 1:-1] + places[:, :-2], dim=2)
    return torch.exp(-acceleration.mean(dim=1) / SMOOTHNESS_PIXELS)


def moves(clips: torch.Tensor) -> torch.Tensor:
    """Whether the centroid's last place is more than `DYNAMIC_PIXELS` from its first: bool [n]."""
    places = centroids(clips)
    distance: torch.Tensor = torch.linalg.vector_norm(places[:, -1] - places[:, 0], dim=1)
    return distance > DYNAMIC_PIXELS


def figures(judged: Mapping[str, torch.Tensor], reference: torch.Tensor) -> dict[str, float]:
    """All figures of one set of clips.

    Args:
        judged: per clip, all [n] but the features: "features" [n, D], "digit", "direction" and "speed" (bool: as the
            prompt says), "smoothness" and "quality" in [0, 1], "moves" (bool).
        reference: features of real clips [m, D].
    """
    share = {name: float(judged[name].double().mean()) for name in judged if name != "features"}
    made = {
        "frechet": frechet_distance(judged["features"], reference),
        "prompt_accuracy": float((judged["digit"].bool() & judged["direction"].bool()).double().mean()),
        "digit_accuracy": share["digit"],
        "direction_accuracy": share["direction"],
        "speed_accuracy": share["speed"],
        "motion_smoothness": share["smoothness"],
        "dynamic_degree": share["moves"],
        "imaging_quality": share["quality"],
    }
    return {**made, "average": sum(made[name] for name in AVERAGED) / len(AVERAGED)}


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Mean and Student's t-interval of independent values (one a seed): {"mean", "low", "high"}.

    Raises:
        RequestError: fewer than two values.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    n = len(values)
    if n < 2:
        raise RequestError(f"seeds: {n} given, expected at least 2; the confidence interval comes from their spread")
    mean = sum(values) / n
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = error * float(stdtrit(n - 1, 0.5 + confidence / 2.0))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The interval of a - b over seeds that both share: narrower than that of two unpaired means."""
    return interval([left - right for left, right in zip(a, b, strict=True)])
