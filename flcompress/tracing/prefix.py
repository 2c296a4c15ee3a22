"""Skip block after block on the same inputs without recomputing the blocks before the skipped one.

Their outputs are kept in host memory: at real size those of all blocks are as large as the model.
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
    """Outputs of every block in the last full forward; see `remember`.

    Skipping the first block needs none of them, since no block precedes it.
    """

    def __init__(self, model: nn.Module, graph: BlockGraph) -> None:
        self._model = model
        self._graph = graph
        self._recording = True
        self._outputs: dict[str, Any] = {}
        self._arguments: list[_Stored] = []  # of the first block, to recognise a forward with other inputs

    @contextmanager
    def skipping(self, *paths: str, verify: bool = True) -> Iterator[None]:
        """Make blocks before the first of `paths` return their remembered outputs, without computing them.

        Those at `paths` are identities, and later ones run. Forwards must get the remembered inputs.

        Args:
            paths: the blocks to skip.
            verify: whether forwards compare their inputs with the remembered ones, for which the host waits for the
                GPU.

        Raises:
            RequestError: an unknown path, no remembered outputs for the blocks before, one of them skipped by an
                enclosing `skip`; in the forward, other inputs than the remembered ones.
        """
        skipped = require_blocks(self._graph, paths)
        order = [block.path for block in self._graph.blocks]
        first = min(skipped, key=order.index)
        earlier = order[: order.index(first)]
        if len(self._outputs) < len(earlier):
            raise RequestError(f"cannot skip '{first}': nothing is remembered; run one full forward first")
        for path in earlier:
            if isinstance(vars(self._model.get_submodule(path)).get("forward"), Identity):
                raise RequestError(f"'{path}' is skipped already and comes before '{first}'; name both in one call")
        identities = {path: Identity(self._model.get_submodule(path), self._graph.block(path)) for path in skipped}
        with self._answering(earlier, identities, verify=verify):
            yield

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Make every remembered block return its remembered output; the others run."""
        with self._answering(list(self._outputs), {}, verify=True):
            yield

    @contextmanager
    def _answering(self, paths: list[str], others: Mapping[str, Callable[..., Any]], *, verify: bool) -> Iterator[None]:
        first = self._graph.blocks[0].path if verify else None
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
                tensors, remembered = tensors_of((args, kwargs)), [stored.copy() for stored in self._arguments]
                if len(tensors) != len(remembered) or not all(map(torch.equal, tensors, remembered)):
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
                    self._arguments = [_Stored(tensor) for tensor in tensors_of((args, kwargs))]

        return hook


@contextmanager
def remember(model: nn.Module, graph: BlockGraph, *, until: str | None = None) -> Iterator[PrefixMemory]:
    """Yield a memory of block outputs that every forward inside the `with` block refills, in copies on the host.

    With `until` only the blocks before that one are remembered. Remembered outputs carry no gradient.
    """
    memory = PrefixMemory(model, graph)
    with ExitStack() as hooks:
        for index, block in enumerate(graph.blocks):
            if block.path == until:
                break
            module = model.get_submodule(block.path)
            hook = memory._record(block.path, first=index == 0)
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield memory


class _Stored:
    """Values of a tensor in host memory, copied both ways, because a model may write into a block's output."""

    def __init__(self, tensor: Tensor) -> None:
        plain = tensor.detach()
        self._device = plain.device
        # On one stream the copies keep their order, so neither waits for the GPU.
        self._values = plain.clone() if plain.device.type == "cpu" else host_like(plain).copy_(plain, non_blocking=True)

    def copy(self) -> Tensor:
        """Return a new tensor on the original device."""
        return self._values.to(self._device, copy=True, non_blocking=True)


def host_like(tensor: Tensor) -> Tensor:
    """Allocate host memory for a tensor's values, page-locked if possible, which copies several times faster."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(tensor, device="cpu")
