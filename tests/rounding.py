"""How far apart rounding alone can move two computations of one number."""

from __future__ import annotations

import math

import torch

CERTAINTY = 10.0
"""Standard deviations: with independent errors the chance that rounding exceeds the bound is below 1e-21."""


def rounding(operations: int, dtype: torch.dtype = torch.float32) -> float:
    """The bound on the relative difference of two results of `operations` operations in a chain, each rounded once.

    sqrt(2) c sqrt(n) u, with u = eps / 2: every operation is off by at most u, independently, with mean zero (Higham &
    Mary, "A new approach to probabilistic rounding error analysis", 2019, theorem 2.4). It holds for every order of a
    sum, so for every kernel, processor and number of threads. It is relative to the magnitudes that are added, so
    compare on a scale that cancellation leaves large: that of the whole result, not of one small element.
    """
    return CERTAINTY * math.sqrt(2.0 * operations) * torch.finfo(dtype).eps / 2.0
