"""Statistics of measurements: confidence intervals over seeds, and the Frechet distance of two sets of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flcompress.errors import RequestError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` equal `mean` if there is only a number."""

    mean: float
    low: float
    high: float

    @property
    def measured(self) -> bool:
        """Whether there is an interval, and not only a number."""
        return self.high > self.low

    def holds(self, value: float) -> bool:
        """Return whether the value is within the interval, its ends included."""
        return self.low <= value <= self.high

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean and Student's t-interval of independent values (one a seed).

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
    return Interval(mean, mean - half, mean + half)


def paired(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the interval of a - b over shared seeds; it is narrower than that of two unpaired means."""
    return interval([left - right for left, right in zip(a, b, strict=True)])


def bootstrap(values: Sequence[float], confidence: float = 0.95, draws: int = 2000) -> Interval:
    """Return the mean and the percentile interval of its bootstrap (Efron 1979), always by the same draws.

    For values of prompts, each the mean over its clips: what is drawn with replacement is whole prompts. Differences of
    two models on the same prompts give the paired interval. A single value has no interval.

    Raises:
        RequestError: no value.
    """
    import numpy as np

    if not values:
        raise RequestError("bootstrap: no values given, expected at least 1")
    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, mean, mean)
    chosen = np.random.default_rng(0).integers(len(numbers), size=(draws, len(numbers)))
    low, high = np.quantile(numbers[chosen].mean(axis=1), [0.5 - confidence / 2.0, 0.5 + confidence / 2.0])
    return Interval(mean, float(min(low, mean)), float(max(high, mean)))


def proportion(successes: int, draws: int, confidence: float = 0.95) -> Interval:
    """Return the share of successes and its exact binomial interval (Clopper and Pearson 1934).

    Raises:
        RequestError: no draw.
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= draws or draws < 1:
        raise RequestError(f"proportion: {successes} of {draws} given, expected at least 1 draw")
    tail, failures = 0.5 - confidence / 2.0, draws - successes
    low = float(betaincinv(successes, failures + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, failures, 1.0 - tail)) if failures else 1.0
    return Interval(successes / draws, low, high)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the Frechet distance of two sets of features, each fitted by a Gaussian (Heusel et al. 2017, eq. 6).

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)

    The last trace is the nuclear norm of S_a^1/2 S_b^1/2: with roots from symmetric eigen-decompositions nothing turns
    complex and no small eigenvalue is squared, so rank-deficient covariances need no special care.

    Args:
        a: features [n, D], n at least 2.
        b: features [m, D], m at least 2.

    Raises:
        RequestError: fewer than two features in a set, or different dimensions.
    """
    import torch

    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[1]:
            raise RequestError(
                f"features {name}: shape {tuple(features.shape)} given, expected [n >= 2, D], the same D for both sets"
            )
    a, b = a.double(), b.double()
    root_a, root_b = _root(a), _root(b)
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return max(0.0, float(apart + traces - 2.0 * torch.linalg.matrix_norm(root_a @ root_b, ord="nuc")))


def _root(features: torch.Tensor) -> torch.Tensor:
    """Return the symmetric square root [D, D] of the covariance; rounding below zero is cut off."""
    import torch

    centred = features - features.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    root: torch.Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root
