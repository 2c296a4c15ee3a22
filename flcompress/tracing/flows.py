"""Which tensors flow from block to block: a second run in which every tensor carries the names of its sources."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flcompress.ir.block import Flow, TensorSpec
from flcompress.ir.graph import INPUT, OUTPUT, Edge
from flcompress.tracing.call import named, outputs_of, spec_of, tensors_of
from flcompress.tracing.replay import Layout
from flcompress.tracing.running import Run
from flcompress.tracing.taint import Source, Taint


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
