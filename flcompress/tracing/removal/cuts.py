"""Entries of a forward's arguments that go with removed blocks, as in a list with a prompt per block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Lost = tuple[int, tuple[int, ...]]
"""Length of a sequence that follows the blocks, and the positions that it loses."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries to remove from an argument.

    Attributes:
        entries: their positions.
        axis: their axis in a tensor; None if the argument is a list of tensors.
    """

    entries: tuple[int, ...]
    axis: int | None = None

    def of(self, value: Any) -> Any:
        """Return the argument for the smaller model."""
        if self.axis is None:
            return type(value)(entry for position, entry in enumerate(value) if position not in self.entries)
        remaining = [position for position in range(value.shape[self.axis]) if position not in self.entries]
        return value.index_select(self.axis, torch.tensor(remaining, dtype=torch.long, device=value.device))


def cut_inputs(inputs: Mapping[str, Any], cuts: Mapping[str, Cut]) -> dict[str, Any]:
    """Return the arguments for the smaller model."""
    return {name: cuts[name].of(value) if name in cuts else value for name, value in inputs.items()}


def input_cuts(inputs: Mapping[str, Any], lost: Sequence[Lost]) -> Iterator[dict[str, Cut]]:
    """Yield cuts of one argument each, if it is as long as something that loses entries: guesses, for a proof.

    A tensor may have one more entry in front: BriaFibo 2 gives its resampler the first bundle of a prompt.
    """
    cuts: list[dict[str, Cut]] = []
    for name, value in inputs.items():
        for length, positions in lost:
            if len(positions) == length:
                continue
            if isinstance(value, list | tuple) and len(value) == length:
                cuts.append({name: Cut(positions)})
            for axis, size in enumerate(value.shape) if isinstance(value, Tensor) else ():
                if 0 <= size - length <= 1:
                    cuts.append({name: Cut(tuple(position + size - length for position in positions), axis)})
    yield from (cut for number, cut in enumerate(cuts) if cut not in cuts[:number])
