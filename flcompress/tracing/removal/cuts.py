"""Entries of a forward's arguments that go with removed blocks: a list of prompts with one for every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Lost = tuple[int, tuple[int, ...]]
"""A length that something has by the blocks, and the places in it that go."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries to leave out of an argument.

    Attributes:
        entries: their places.
        axis: along which they lie in a tensor; None where the argument is a list of tensors.
    """

    entries: tuple[int, ...]
    axis: int | None = None

    def of(self, value: Any) -> Any:
        """The argument for the smaller model."""
        if self.axis is None:
            return type(value)(one for place, one in enumerate(value) if place not in self.entries)
        kept = [place for place in range(value.shape[self.axis]) if place not in self.entries]
        return value.index_select(self.axis, torch.tensor(kept, dtype=torch.long, device=value.device))


def cut_inputs(inputs: Mapping[str, Any], cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """The arguments for the smaller model."""
    return {name: cuts[name].of(value) if name in cuts else value for name, value in inputs.items()}


def input_cuts(inputs: Mapping[str, Any], lost: Sequence[Lost]) -> Iterator[dict[str, Cut]]:
    """One argument at a time without the entries that go, where it is as long as something that loses entries.

    A tensor may have one more before them: BriaFibo 2 gives its resampler the first bundle of a prompt. Guesses, for
    a proof.
    """
    found: list[dict[str, Cut]] = []
    for name, value in inputs.items():
        for length, places in lost:
            if len(places) == length:
                continue
            if isinstance(value, list | tuple) and len(value) == length:
                found.append({name: Cut(places)})
            for axis, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
                if 0 <= size - length <= 1:
                    found.append({name: Cut(tuple(place + size - length for place in places), axis)})
    yield from (cut for number, cut in enumerate(found) if cut not in found[:number])
