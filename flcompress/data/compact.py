"""Conditioning as a dataset stores it: without the padding of prompts, and in half precision where that loses nothing.

What is read is what was encoded, bit for bit, in fp32 and padded as the pipeline pads. Only the embeddings of tokens
that a family's mask hides are read as zeros, whatever the text encoder made of its padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flcompress.models.families.family import Family
from flcompress.models.families.shared import MASKED

ROWS = ".rows"
"""Suffix of [n + 2] numbers for a tensor whose n rows are stored one after the other, each without its trailing zeros.

They are the length of a whole row, 0, and the end of each row.
"""

HALVES = (torch.bfloat16, torch.float16)


def rows_of(name: str) -> str:
    """Return the name of the tensor that says where the rows of another are."""
    return name + ROWS


def compact(family: Family, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors to store for conditioning [n, ...]."""
    tensors = without_padding(family, tensors)
    stored: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        value = _narrowed(value)
        lengths = _lengths(value)
        if lengths is None or int(lengths.sum()) == len(value) * value.shape[1]:
            stored[name] = value
            continue
        stored[name] = torch.cat([row[:length] for row, length in zip(value, lengths.tolist(), strict=True)])
        stored[rows_of(name)] = torch.cat([torch.tensor([value.shape[1], 0]), lengths.cumsum(0)])
    return stored


def without_padding(family: Family, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return conditioning with zeros after the last token that the mask shows, if the family sees nothing there."""
    embeds, mask = MASKED
    if not family.ignores_padding or mask not in tensors:
        return dict(tensors)
    shown = tensors[mask].flip(1).cummax(dim=1).values.flip(1) > 0
    return {**tensors, embeds: torch.where(shown[..., None], tensors[embeds], 0.0)}


def stored_row(file: Any, name: str, row: int, *, compacted: bool) -> torch.Tensor:
    """Return row [1, ...] of a tensor of an open shard, floating numbers in fp32.

    Args:
        file: the open safetensors file.
        name: the tensor.
        row: which row.
        compacted: whether the file has `ROWS` of it.
    """
    rows, value = file.get_slice(name), torch.empty(0)
    if not compacted:
        value = rows[row : row + 1]
    else:
        length, *ends = file.get_tensor(rows_of(name))[[0, row + 1, row + 2]].tolist()
        own = rows[ends[0] : ends[1]]
        value = torch.cat([own, own.new_zeros(length - len(own), *own.shape[1:])])[None]
    return value.float() if value.is_floating_point() else value


def _narrowed(value: torch.Tensor) -> torch.Tensor:
    """Return the tensor in half precision if every number of it is exactly one of that."""
    if value.dtype == torch.float32:
        for dtype in HALVES:
            half = value.to(dtype)
            if torch.equal(half.float(), value):
                return half
    return value


def _lengths(value: torch.Tensor) -> torch.Tensor | None:
    """Return the length [n] of each row without its trailing zeros; None for a tensor without rows."""
    if value.ndim < 2 or not value.numel():
        return None
    filled = value != 0
    if value.is_floating_point():
        filled |= torch.signbit(value)  # padding is +0
    used = filled.flatten(2).any(dim=2) if value.ndim > 2 else filled
    return (used * torch.arange(1, value.shape[1] + 1)).amax(dim=1)
