"""A denoising network as losses and samplers see it: its type, and what conditions it.

Conditioning is all that a network takes besides latents and noise level: the prompt and, for some models, the first
frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flcompress.progress import ProgressSink

Conditioning = Mapping[str, torch.Tensor]
"""Named tensors, the batch axis first: "encoder_hidden_states" [n, tokens, channels], masks, a first frame, ..."""

PROMPT_MASK = "encoder_attention_mask"
"""Which tokens of the prompt are not padding, [n, tokens], in the conditioning of networks that take a mask."""

Network = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(latents [n, channels, frames, height, width], timestep [n], conditioning) -> prediction, shaped as the latents."""


def select(conditioning: Conditioning, index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Return the conditioning of some of the samples; an index [m] is in host memory."""
    if isinstance(index, slice):
        return {name: tensor[index] for name, tensor in conditioning.items()}
    devices = {tensor.device for tensor in conditioning.values()}
    on = {device: index.to(device, non_blocking=True) for device in devices}
    return {name: tensor[on[tensor.device]] for name, tensor in conditioning.items()}


def to_device(
    conditioning: Conditioning, device: torch.device | str, *, non_blocking: bool = False
) -> dict[str, torch.Tensor]:
    """Return the conditioning on a device, but for the prompt's mask, which stays in host memory.

    There a network reads how long prompts are without waiting for the device.

    Args:
        conditioning: of any networks.
        device: where they compute.
        non_blocking: whether the host does not wait for copies from its own memory, where the conditioning is then.
    """
    return {
        name: tensor.cpu() if name == PROMPT_MASK else tensor.to(device, non_blocking=non_blocking)
        for name, tensor in conditioning.items()
    }


def beside(x: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
    """Return the conditioning, with all that is in host memory, on the device of x; the host does not wait for it."""
    return {name: tensor.to(x.device, non_blocking=True) for name, tensor in conditioning.items()}


@dataclass
class CallCounter:
    """Reports how many of the expected calls of some networks were made, after each."""

    progress: ProgressSink | None
    total: int
    done: int = 0

    def around(self, network: Network) -> Network:
        """Return the network, its calls counted."""

        def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            prediction = network(x, timestep, conditioning)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, {})
            return prediction

        return call


def with_negative_prompt(conditioning: Conditioning, negative: Conditioning) -> dict[str, torch.Tensor]:
    """Replace the prompts by the negative prompt's tensors [1, ...]; what is no prompt (a first frame) stays."""
    n = len(next(iter(conditioning.values())))
    return {**conditioning, **{name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in negative.items()}}


def drop_captions(conditioning: Conditioning, negative: Conditioning, where: torch.Tensor) -> dict[str, torch.Tensor]:
    """Replace the prompts of the samples where `where` [n] holds by the negative prompt [1, ...] (caption dropout)."""
    result = dict(conditioning)
    for name, tensor in negative.items():
        own = conditioning[name]
        result[name] = torch.where(where.reshape(-1, *([1] * (tensor.ndim - 1))), tensor.to(own.dtype), own)
    return result
