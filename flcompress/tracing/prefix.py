"""Skipping block after block on the same inputs without computing what comes before the skipped one.

What is remembered lies in host memory: at real size the outputs of all blocks are as large as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flcompress.errors import RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.tracing.call import tensors_of
from flcompress.tracing.skip import Identity, replaced_forwards, require_blocks


class PrefixMemory:
    """What every block returned in the last full forward; made by `remember`.

    Skipping from the first block on needs nothing of it: no block lies before.
    """

    def __init__(self, model: nn.Module, graph: BlockGraph) -> None:
        self._model = model
        self._graph = graph
        self._recording = True
        self._outputs: dict[str, Any] = {}
        self._arguments: list[_Stored] = []  # of the first block: what tells one forward's inputs from another's

    @contextmanager
    def skipping(self, *paths: str) -> Iterator[None]:
        """While active, blocks before the first of `paths` return what they returned before and compute nothing.

        Those at `paths` are identities, the rest runs. Forwards in it must be given the inputs that were remembered.
        Raises RequestError on an unknown path, when blocks lie before and nothing is remembered, when an earlier one is
        skipped by an enclosing `skip`, and (in the forward) when the first block meets other inputs.
        """
        skipped = require_blocks(self._graph, paths)
        order = [one.path for one in self._graph.blocks]
        first = min(skipped, key=order.index)
        recalled = order[: order.index(first)]
        if len(self._outputs) < len(recalled):
            raise RequestError(f"cannot skip '{first}': nothing is remembered; run one full forward first")
        for path in recalled:
            if isinstance(vars(self._model.get_submodule(path)).get("forward"), Identity):
                raise RequestError(f"'{path}' is skipped already and lies before '{first}'; name both in one call")
        identities = {path: Identity(self._model.get_submodule(path), self._graph.block(path)) for path in skipped}
        with self._answering(recalled, identities):
            yield

    @contextmanager
    def recalled(self) -> Iterator[None]:
        """While active, every block that was remembered returns what it returned before; the others run."""
        with self._answering(list(self._outputs), {}):
            yield

    @contextmanager
    def _answering(self, paths: list[str], others: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        first = self._graph.blocks[0].path
        recording, self._recording = self._recording, False
        try:
            with replaced_forwards(
                self._model, {**{path: self._recall(path, first=path == first) for path in paths}, **others}
            ):
                yield
        finally:
            self._recording = recording

    def _recall(self, path: str, *, first: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if first:
                given, kept = tensors_of((args, kwargs)), [one.copy() for one in self._arguments]
                if len(given) != len(kept) or not all(map(torch.equal, given, kept)):
                    raise RequestError(
                        f"'{path}' was given other inputs than the remembered ones; give the same inputs"
                    )
            return tree_map_only(_Stored, _Stored.copy, self._outputs[path])

        return forward

    def _record(self, path: str, *, first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._recording:
                self._outputs[path] = tree_map_only(Tensor, _Stored, output)
                if first:
                    self._arguments = [_Stored(one) for one in tensors_of((args, kwargs))]

        return hook


@contextmanager
def remember(model: nn.Module, graph: BlockGraph, *, until: str | None = None) -> Iterator[PrefixMemory]:
    """A memory that every forward inside the `with` block fills anew; it costs a copy of their outputs on the host.

    With `until` only the blocks before that one are remembered. What is remembered carries no gradient.
    """
    memory = PrefixMemory(model, graph)
    with ExitStack() as hooks:
        for place, block in enumerate(graph.blocks):
            if block.path == until:
                break
            module = model.get_submodule(block.path)
            hook = memory._record(block.path, first=place == 0)
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield memory


class _Stored:
    """The values of a tensor, in host memory. Copies both ways, because a model may write into a block's output."""

    def __init__(self, tensor: Tensor) -> None:
        plain = tensor.detach()
        self._device = plain.device
        # On one stream the copies keep their order, so neither waits for the GPU.
        self._values = (
            plain.clone() if plain.device.type == "cpu" else _host_like(plain).copy_(plain, non_blocking=True)
        )

    def copy(self) -> Tensor:
        """A fresh tensor where the remembered one was."""
        return self._values.to(self._device, copy=True, non_blocking=True)


def _host_like(tensor: Tensor) -> Tensor:
    """Memory on the host for a tensor's values, page-locked where the system grants it: several times quicker."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(tensor, device="cpu")
