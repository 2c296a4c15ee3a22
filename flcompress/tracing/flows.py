"""Which tensors flow from block to block: a second run in which every tensor carries the names of its sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from flcompress.ir.block import Flow, TensorSpec
from flcompress.ir.graph import INPUT, OUTPUT, Edge
from flcompress.tracing.call import named, outputs_of, spec_of, tensors_of
from flcompress.tracing.replay import Layout
from flcompress.tracing.running import Run

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


def flows_of(run: Run, layouts: Mapping[str, Layout]) -> dict[Edge, set[Flow]]:
    """The data flow between blocks.

    Every block needs the conditioning (timestep, prompt), so edges from "input" are kept for residual streams only.
    """
    taint = Taint()
    specs: dict[Source, TensorSpec] = {}
    flows: dict[Edge, set[Flow]] = {}

    def give(path: str, name: str, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                specs.setdefault((path, name), spec_of(tensor))
                taint.mark(tensor, [(path, name)])

    def take(path: str, name: str, tree: Any, *, stream: bool) -> None:
        sources = taint.of(tree)
        from_blocks = {source for source in sources if source[0] != INPUT}
        if stream and not sources:  # a learned token: no input feeds it
            specs[INPUT, "parameters"] = spec_of(tree)
            sources = frozenset([(INPUT, "parameters")])
        for source in from_blocks or (sources if stream else ()):
            flow = Flow(source=source[1], target=name, spec=specs[source])
            flows.setdefault((source[0], path), set()).add(flow)

    def before(path: str) -> Any:
        streams = {stream.input for stream in layouts[path].streams}

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for name, value in named(module, args, kwargs).items():
                take(path, name, value, stream=name in streams or not streams)

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for place, value in enumerate(outputs_of(output)):
                give(path, str(place), value)

        return hook

    with ExitStack() as hooks:
        for path in layouts:
            child = run.module.get_submodule(path)
            hooks.callback(child.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            hooks.callback(child.register_forward_hook(after(path)).remove)
        with taint:
            for name, value in run.inputs.items():
                give(INPUT, name, value)
            for place, leaf in enumerate(tensors_of(run())):
                take(OUTPUT, str(place), leaf, stream=True)
    return flows
