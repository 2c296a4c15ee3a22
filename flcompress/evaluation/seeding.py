"""Randomness of an evaluation as a function of what it is for, so that every contender meets the same draws."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the SHA-256 of any printable parts: `generator(seed, "noise", prompt)`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
