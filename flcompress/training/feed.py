"""What the updates of a training read and draw on the host: ready when a GPU has computed the update before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_map, tree_map_only

from flcompress.ahead import ahead
from flcompress.core.steps import PassContext
from flcompress.diffusion.network import to_device
from flcompress.draws import Draws
from flcompress.tracing.prefix import host_like

_Inputs = TypeVar("_Inputs")

Read = Callable[[Draws], Any]
"""Draws of a micro batch -> tensors on the host, in tuples; a dictionary is conditioning."""

THREADED = ("cuda",)
"""Kinds of device for which a thread prepares."""


class Feed:
    """The inputs of micro batches, on the training's device.

    On a GPU a thread prepares them in page-locked memory, one micro batch ahead: shards are read and noise is drawn
    while the GPU computes, and copies do not hold up the host. On a CPU, which would share its cores with the thread,
    they are made when they are taken. Either way they are the same, since they follow from seed and step.

    A loss takes all that it draws or reads at once, and the training runs with its feed:

        feed = Feed(context, read)
        role.update(draws, lambda draws: loss(*feed.take(read, draws)))
        train(..., feed=feed)

    Args:
        context: the training's.
        reads: what makes the inputs of a step's updates, in their order. They are called in the order of the draws,
            and may change nothing that the training uses.
    """

    def __init__(self, context: PassContext, *reads: Read) -> None:
        self._context, self._reads = context, reads
        self._prepared: Iterator[tuple[Read, slice, Any]] | None = None

    @contextmanager
    def preparing(self, steps: Iterable[Draws]) -> Iterator[None]:
        """Prepare the inputs of steps with these draws, all of which or the first of which are then taken in order."""
        if (kind := torch.device(self._context.device).type) not in THREADED:
            yield
            return
        card = torch.cuda.current_device() if kind == "cuda" else None
        with ahead(self._prepare(steps, card)) as self._prepared:
            try:
                yield
            finally:
                self._prepared = None

    def take(self, read: Callable[[Draws], _Inputs], draws: Draws) -> _Inputs:
        """Return `read(draws)` on the training's device; of conditioning, what `to_device` puts there.

        Raises:
            DataError, OSError: a shard cannot be read, in the step that needs it.
        """
        if self._prepared is None:
            inputs = read(draws)
        else:
            prepared, mine, inputs = next(self._prepared)
            assert (prepared, mine) == (read, draws.mine), "a step takes its inputs in the order of the feed's reads"

        device = self._context.device

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return to_device(value, device, non_blocking=True)
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        placed: _Inputs = tree_map(moved, inputs, is_leaf=lambda value: isinstance(value, dict))
        return placed

    def _prepare(self, steps: Iterable[Draws], card: int | None) -> Iterator[tuple[Read, slice, Any]]:
        if card is not None:
            torch.cuda.set_device(card)  # each thread has its own: page-locking would open the first GPU
        for draws in steps:
            for read in self._reads:
                for part in draws.micro_batches(self._context.at_once(draws.batch)):
                    inputs = tree_map_only(torch.Tensor, lambda tensor: host_like(tensor).copy_(tensor), read(part))
                    yield read, part.mine, inputs
