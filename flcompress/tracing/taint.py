"""Where a tensor comes from: the blocks' outputs (or the model's inputs) that were last mixed into it."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Source = tuple[str, str]  # (block path or "input", output index or input name)


class Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate its modes
    """While it is active, every tensor inherits the sources of the tensors it was computed from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: MutableMapping[Tensor, frozenset[Source]] = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, sources: Iterable[Source]) -> None:
        """From here on `tensor` comes from `sources` alone."""
        self._sources[tensor] = frozenset(sources)

    def of(self, tree: Any) -> frozenset[Source]:
        """The sources of every tensor in a structure."""
        none: frozenset[Source] = frozenset()
        return none.union(*(self._sources.get(leaf, none) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = self.of((args, kwargs))
        result = func(*args, **kwargs)
        if sources:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._sources[leaf] = sources
            if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0]._base is not None:
                # Writing through a view changes the tensor it is a view of.
                self._sources[args[0]._base] = sources | self.of(args[0]._base)
        return result
