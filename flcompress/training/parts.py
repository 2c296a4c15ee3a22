"""Which numbers of a tensor a process holds, and tensors of a checkpoint, read by range, however they were divided."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from flcompress.errors import TrainingError
from flcompress.models.shards import LiveTensor, StoredTensor, file_metadata, file_tensors, write_file

RANGES = "ranges"
"""Key of a file's metadata: JSON of {name: [index of the first number, numbers of the whole tensor]}."""


@dataclass(frozen=True, slots=True)
class Part:
    """The numbers of a tensor that this process holds: a range of them, in row-major order.

    Every engine divides tensors so: FSDP2 by rows, ZeRO at any number.

    Attributes:
        tensor: the numbers, in live storage.
        first: index of the first one in the whole tensor.
        total: numbers of the whole tensor; None if every process holds all of them.
        copy: whether another process holds the same numbers, and writes them.
    """

    tensor: torch.Tensor
    first: int = 0
    total: int | None = None
    copy: bool = False


def local(value: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a DTensor, or the tensor itself; live storage."""
    part: torch.Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part.detach()


def own_parts(parts: Mapping[str, Part], *, main: bool) -> dict[str, Part]:
    """Return what this process writes of its parts: what only it holds, and the main one what every process holds."""
    return {
        name: part
        for name, part in parts.items()
        if (main if part.total is None else part.tensor.numel() > 0 and not part.copy)
    }


def write_parts(path: Path, parts: Mapping[str, Part], *, main: bool, beat: Callable[[], None]) -> str | None:
    """Write a process's parts into one file; return its SHA-256, or None if there is nothing to write.

    Args:
        path: the file.
        parts: what the process holds, by name.
        main: whether this is the main process, which writes what every process holds.
        beat: called after each piece.
    """
    own = own_parts(parts, main=main)
    if not own:
        return None
    ranges = {name: [part.first, part.total] for name, part in own.items() if part.total is not None}
    tensors = {name: LiveTensor(part.tensor) for name, part in own.items()}
    return write_file(path, tensors, {RANGES: json.dumps(ranges, separators=(",", ":"))}, beat)


class StoredParts:
    """The tensors of files that `write_parts` wrote, whole or in ranges.

    Args:
        folder: the folder of the files, for messages.
        files: theirs, of all processes that wrote.
        beat: called for each tensor that is read.

    Raises:
        ModelError: a file is not a whole safetensors file.
    """

    def __init__(self, folder: Path, files: Iterable[Path], beat: Callable[[], None] = lambda: None) -> None:
        self._folder, self._beat = folder, beat
        self._ranges: dict[str, list[tuple[int, int, StoredTensor]]] = {}
        self._totals: dict[str, int] = {}
        for file in files:
            ranges = json.loads(file_metadata(file)[RANGES])
            for name, tensor in file_tensors(file).items():
                first, total = ranges.get(name, (0, tensor.count))
                self._ranges.setdefault(name, []).append((first, first + tensor.count, tensor))
                self._totals[name] = total
            beat()

    def fill(self, name: str, part: Part) -> None:
        """Copy the numbers of a part into its storage, from whichever files hold them.

        Raises:
            TrainingError: the checkpoint lacks some of them, or its tensor has another size.
        """
        self._beat()
        target = part.tensor.contiguous().view(-1)
        total = target.numel() if part.total is None else part.total
        if self._totals.get(name) != total:
            stored = f"{self._totals[name]} numbers of" if name in self._totals else "no"
            raise self._error(f"it has {stored} {name}, expected {total}")
        position, end = part.first, part.first + target.numel()
        while position < end:
            reach = [entry for entry in self._ranges[name] if entry[0] <= position < entry[1]]
            if not reach:
                raise self._error(f"number {position} of {name} is in none of its files")
            first, last, tensor = reach[0]
            count = min(end, last) - position
            tensor.numbers(position - first, count).fill(target[position - part.first : position - part.first + count])
            position += count
        if not part.tensor.is_contiguous():  # then `target` is a copy
            part.tensor.copy_(target.view(part.tensor.shape))

    def number(self, name: str) -> int:
        """Return a whole number that was stored as a tensor."""
        value = torch.zeros((), dtype=torch.int64)
        self.fill(name, Part(value))
        return int(value)

    def _error(self, trouble: str) -> TrainingError:
        return TrainingError(f"{self._folder}: {trouble}; remove {self._folder.parent} to begin this pass again")
