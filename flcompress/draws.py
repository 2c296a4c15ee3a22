"""Randomness as a function of (seed, purpose, step), so that a resumed run draws what an unbroken one would have."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import torch


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any printable parts: `seed_of(recipe_seed, "dmd", step)`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


class Draws:
    """The random draws of one training step, for one of the processes that share its batch.

    What is drawn from `shared` is the same in every process; noise comes sample by sample, each from a generator of its
    own. So a step draws the same whatever the number of processes, and each draws no more noise than it uses.

    Args:
        parts: what seeds them: recipe seed, purpose, step.
        batch: samples of the whole step, over all processes.
        rank: which process this is.
        processes: how many there are; they must divide `batch`.

    Attributes:
        batch: samples over all processes.
        mine: which of the batch's samples these are.
        share: what part of its process's samples they are; see `micro_batches`.
        shared: draws for the whole batch.
    """

    def __init__(self, *parts: object, batch: int, rank: int = 0, processes: int = 1) -> None:
        if batch % processes:
            raise ValueError(f"batch: {batch} given, expected a multiple of {processes} processes")
        own = batch // processes
        self.batch = batch
        self.mine = slice(rank * own, (rank + 1) * own)
        self.share = 1.0
        self.shared = generator(*parts)
        self._own = [generator(*parts, "sample", position) for position in range(batch)[self.mine]]

    def __len__(self) -> int:
        """Samples of this process, or of a micro batch of them."""
        return len(self._own)

    def micro_batches(self, size: int) -> Iterator[Draws]:
        """These samples, at most `size` at a time, one after the other: together they draw what these would.

        What is shared is drawn again for each, so all must draw alike. Afterwards `shared` stands where they left it.
        """
        if size >= len(self):
            yield self
            return
        start = self.shared.get_state()
        for first in range(0, len(self), size):
            part = copy.copy(self)
            part._own = self._own[first : first + size]
            offset = self.mine.start + first
            part.mine = slice(offset, offset + len(part))
            part.share = len(part) / len(self)
            self.shared.set_state(start)
            yield part

    def uniform(self) -> torch.Tensor:
        """A number in [0, 1) for each of this process's samples, [n]."""
        return torch.rand(self.batch, generator=self.shared)[self.mine]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal noise [n, *shape] for this process's samples."""
        return torch.stack([torch.randn(shape, generator=own) for own in self._own])
