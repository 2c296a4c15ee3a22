"""Data flow from block to block, found by a second run in which every tensor carries the names of its origins."""

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
from flcompress.tracing.call import arguments_by_name, outputs_of, spec_of, tensors_of
from flcompress.tracing.replay import Layout
from flcompress.tracing.running import Run

Origin = tuple[str, str]  # (block path or "input", output index or input name)


class Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate its modes
    """Dispatch mode in which every tensor inherits the origins of the tensors it was computed from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origins: MutableMapping[Tensor, frozenset[Origin]] = WeakTensorKeyDictionary()

    def mark(self, tensor: Tensor, origins: Iterable[Origin]) -> None:
        """Set the origins of `tensor`."""
        self._origins[tensor] = frozenset(origins)

    def of(self, tree: Any) -> frozenset[Origin]:
        """Return the origins of all tensors in a structure."""
        none: frozenset[Origin] = frozenset()
        return none.union(*(self._origins.get(leaf, none) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        origins = self.of((args, kwargs))
        result = func(*args, **kwargs)
        if origins:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._origins[leaf] = origins
            if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0]._base is not None:
                # Writing through a view changes the tensor it is a view of.
                self._origins[args[0]._base] = origins | self.of(args[0]._base)
        return result


def flows_of(run: Run, layouts: Mapping[str, Layout]) -> dict[Edge, set[Flow]]:
    """Return the data flow between blocks.

    Every block needs the conditioning (timestep, prompt), so edges from "input" are kept for residual streams only.
    """
    taint = Taint()
    specs: dict[Origin, TensorSpec] = {}
    flows: dict[Edge, set[Flow]] = {}

    def give(path: str, name: str, tree: Any) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                specs.setdefault((path, name), spec_of(tensor))
                taint.mark(tensor, [(path, name)])

    def take(path: str, name: str, tree: Any, *, stream: bool) -> None:
        origins = taint.of(tree)
        block_origins = {origin for origin in origins if origin[0] != INPUT}
        if stream and not origins:  # a learned token: no input feeds it
            specs[INPUT, "parameters"] = spec_of(tree)
            origins = frozenset([(INPUT, "parameters")])
        for origin in block_origins or (origins if stream else ()):
            flow = Flow(source=origin[1], target=name, spec=specs[origin])
            flows.setdefault((origin[0], path), set()).add(flow)

    def before(path: str) -> Any:
        streams = {stream.input for stream in layouts[path].streams}

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for name, value in arguments_by_name(module, args, kwargs).items():
                take(path, name, value, stream=name in streams or not streams)

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for index, value in enumerate(outputs_of(output)):
                give(path, str(index), value)

        return hook

    with ExitStack() as hooks:
        for path in layouts:
            child = run.module.get_submodule(path)
            hooks.callback(child.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            hooks.callback(child.register_forward_hook(after(path)).remove)
        with taint:
            for name, value in run.inputs.items():
                give(INPUT, name, value)
            for index, leaf in enumerate(tensors_of(run())):
                take(OUTPUT, str(index), leaf, stream=True)
    return flows
