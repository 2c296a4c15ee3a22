"""Parts of tensors, as processes hold them, in files and back, for others that divide them otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flcompress.errors import TrainingError
from flcompress.training.parts import Part, StoredParts, write_parts

WHOLE = torch.arange(35.0).reshape(5, 7)


def divided(tensor: torch.Tensor, ends: Sequence[int]) -> list[Part]:
    """The ranges of a tensor that end there."""
    flat, starts = tensor.reshape(-1), (0, *ends)
    return [
        Part(flat[start:end].clone(), start, len(flat)) for start, end in zip(starts, (*ends, len(flat)), strict=True)
    ]


def stored(folder: Path, ends: Sequence[int]) -> tuple[list[Path], StoredParts]:
    """Files of processes that hold these ranges of a matrix, and all of a counter; some hold no number."""
    files = []
    for rank, part in enumerate(divided(WHOLE, ends)):
        path = folder / f"rank-{rank}.safetensors"
        parts = {"weight": part, "updates": Part(torch.tensor(rank + 3))}
        if write_parts(path, parts, main=rank == 0, beat=lambda: None) is not None:
            files.append(path)
    return files, StoredParts(folder, files)


@pytest.mark.parametrize("ends", [(), (14,), (1, 2, 20), (0, 35, 35)], ids=str)
@pytest.mark.parametrize("others", [(), (21,), (3, 20, 34), (35, 35)], ids=str)
def test_ranges_are_read_from_whichever_files_hold_them(
    tmp_path: Path, ends: tuple[int, ...], others: tuple[int, ...]
) -> None:
    files, read = stored(tmp_path, ends)
    assert len(files) == 1 + sum(part.tensor.numel() > 0 for part in divided(WHOLE, ends)[1:])
    for part in divided(torch.full_like(WHOLE, torch.nan), others):
        read.fill("weight", part)
        assert torch.equal(part.tensor, WHOLE.reshape(-1)[part.first : part.first + part.tensor.numel()])
    assert read.number("updates") == 3  # the main process's


def test_a_whole_tensor_is_filled_in_its_own_strides(tmp_path: Path) -> None:
    _, read = stored(tmp_path, (9, 10))
    turned = torch.zeros(7, 5).T
    read.fill("weight", Part(turned))
    assert torch.equal(turned, WHOLE)


@pytest.mark.parametrize(
    ("name", "part", "trouble"),
    [
        ("weight", Part(torch.zeros(36)), "it has 35 numbers of weight, expected 36"),
        ("bias", Part(torch.zeros(3)), "it has no bias, expected 3"),
        ("weight", Part(torch.zeros(20), 9, 35), "number 14 of weight is in none of its files"),
    ],
    ids=["size", "name", "range"],
)
def test_what_a_checkpoint_lacks_is_named(tmp_path: Path, name: str, part: Part, trouble: str) -> None:
    folder = tmp_path / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    files, _ = stored(folder, (14, 21))
    with pytest.raises(TrainingError) as caught:
        StoredParts(folder, [files[0], files[2]]).fill(name, part)
    assert str(caught.value) == f"{folder}: {trouble}; remove {folder.parent} to begin this pass again"
