"""What a training keeps in host memory: averages between steps, and the inputs of blocks until the backward.

Numbers are copied, never computed there, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from flcompress.tracing.prefix import host_like

Checkpoint = Callable[..., Any]
"""Recomputes a block in the backward: (block, its arguments) -> its outputs."""


def average(averages: list[torch.Tensor], live: list[torch.Tensor], share: float) -> None:
    """Move averages, which are in host memory, by a share of the way to the weights; one after the other."""
    for mean, weight in zip(averages, live, strict=True):
        here = mean.to(weight.device, non_blocking=True)
        torch._foreach_lerp_([here], [weight], share)
        mean.copy_(here, non_blocking=True)
    settle(live[0])


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory."""
    return host_like(tensor).copy_(tensor)


def settle(tensor: torch.Tensor) -> None:
    """Wait until what was copied from the tensor's device is in host memory."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def inputs_on_host(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpointing function that keeps a block's first input in host memory until the backward needs it.

    That is the stream of tokens, [batch, tokens, width]; what all blocks share (conditioning, rotary tables) stays.
    """

    def checkpoint_on_host(block: nn.Module, stream: torch.Tensor, *rest: Any) -> Any:
        def pack(tensor: torch.Tensor) -> Any:
            # By address: autograd hands over another object. The stream is alive, so no other tensor can have it.
            if tensor.shape != stream.shape or tensor.data_ptr() != stream.data_ptr():
                return tensor
            return to_host(tensor), tensor.device

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            host, device = packed
            back: torch.Tensor = host.to(device, non_blocking=True)
            return back

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(block, stream, *rest)

    return checkpoint_on_host
