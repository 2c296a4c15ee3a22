"""What a network is told beside latents and noise level: the prompt and, for some models, the first frame."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Conditioning = Mapping[str, torch.Tensor]
"""Named tensors, the batch axis first: "encoder_hidden_states" [n, tokens, channels], masks, a first frame, ..."""


def taken(given: Conditioning, index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """The chosen samples."""
    return {name: tensor[index] for name, tensor in given.items()}


def on(given: Conditioning, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The same on a device."""
    return {name: tensor.to(device) for name, tensor in given.items()}


def without_prompt(given: Conditioning, negative: Conditioning) -> dict[str, torch.Tensor]:
    """`given` with the negative prompt's tensors [1, ...] in place of its own; what is no prompt (a frame) stays."""
    n = len(next(iter(given.values())))
    return {**given, **{name: one.expand(n, *one.shape[1:]) for name, one in negative.items()}}


def dropped(given: Conditioning, negative: Conditioning, where: torch.Tensor) -> dict[str, torch.Tensor]:
    """`given` with the empty or negative prompt [1, ...] in the samples where `where` [n] holds (caption dropout)."""
    kept = dict(given)
    for name, one in negative.items():
        kept[name] = torch.where(where.reshape(-1, *([1] * (one.ndim - 1))), one.to(given[name].dtype), given[name])
    return kept
