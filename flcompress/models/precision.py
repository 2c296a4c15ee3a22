"""Half precision in training: autocast over fp32 weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def half_precision(device: str, *, enabled: bool) -> Iterator[None]:
    """Compute in bf16 where that is safe. Without autocast's cache of bf16 weights.

    A training step updates weights several times, and the cache would go on with their old copies.
    """
    with warnings.catch_warnings(), torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False):
        # Norms keep fp32 weights on purpose; PyTorch says that it has no fused kernel for that.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
