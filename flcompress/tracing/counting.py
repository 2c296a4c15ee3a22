"""Count the FLOPs of a forward, block by block, also of weightless models at any input size; list blocks unrun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flcompress.errors import RequestError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.models.inputs import example_inputs, small_config
from flcompress.tracing.call import FORWARD_ERRORS, Call, blank, first_line
from flcompress.tracing.config_keys import build, count_keys
from flcompress.tracing.replay import signature
from flcompress.tracing.running import flop_counter, runnable_on_meta
from flcompress.tracing.skip import replaced_forwards
from flcompress.tracing.tracer import trace


def count_flops(model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Count the FLOPs of a forward on `inputs`, for the whole batch.

    On the meta device nothing is computed and no activation takes memory; modules that are built and called alike are
    counted once and multiplied.

    Returns:
        The FLOPs of the whole forward, and of each module at `paths`, summed over its calls.

    Raises:
        RequestError: the model cannot run on these inputs.
    """
    counter = flop_counter()
    flops_by_path = dict.fromkeys(paths, 0)
    results: dict[str, tuple[Any, int]] = {}
    saved = 0

    def counting(path: str) -> Callable[..., Any]:
        module = model.get_submodule(path)
        stock = module.forward
        weightless = all(parameter.is_meta for parameter in module.parameters())

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal saved
            key = signature(module, Call(blank(args), blank(kwargs), None, 0)) if weightless else ""
            if key in results:
                output, flops = results[key]
                saved += flops
                output = tree_map(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, output)
            else:
                before = counter.get_total_flops()
                output = stock(*args, **kwargs)
                flops = counter.get_total_flops() - before
                if weightless:
                    results[key] = output, flops
            flops_by_path[path] += flops
            return output

        return forward

    forwards = {path: counting(path) for path in flops_by_path}
    with torch.no_grad(), runnable_on_meta(), replaced_forwards(model, forwards):
        try:
            with counter:
                model(**inputs)
        except FORWARD_ERRORS as error:
            raise RequestError(f"{type(model).__name__} cannot run on these inputs: {first_line(error)}") from error
        return counter.get_total_flops() + saved, flops_by_path


def with_flops(graph: BlockGraph, model: nn.Module, inputs: Mapping[str, Any]) -> BlockGraph:
    """Return the graph with the parameter count of `model`, which has its blocks, and the FLOPs of one sample."""
    total, spent = count_flops(model, [block.path for block in graph.blocks], inputs)
    return BlockGraph(
        model_class=graph.model_class,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=total,
        blocks=[replace(block, flops=spent[block.path]) for block in graph.blocks],
        flows=graph.flows,
        config_keys=graph.config_keys,
    )


def graph_at(model: nn.Module, inputs: Mapping[str, Any]) -> BlockGraph:
    """Return the block graph of a weightless model of a known family, with the FLOPs of a forward on `inputs`.

    Streams are found by running blocks, which takes time and memory, so the trace uses a small size; streams keep its
    tensor specs.
    """
    small = build(model, small_config(model)).eval()
    return with_flops(trace(small, example_inputs(small)), model, inputs)


NOT_RUN = "not traced: its streams are not known"


def listed_blocks(model: nn.Module) -> BlockGraph:
    """Return the blocks that the module structure alone shows: no streams, no edges, zero FLOPs.

    Raises:
        RequestError: no list of modules is counted by an integer of the configuration.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    keys = count_keys(model, lists)
    stacks: list[str] = []
    for name in filter(keys.__contains__, lists):  # parents come before their children
        if not name.startswith(tuple(f"{outer}." for outer in stacks)):
            stacks.append(name)
    if not stacks:
        raise RequestError(f"{type(model).__name__}: no list of blocks is counted by its configuration")
    return BlockGraph(
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=0,
        blocks=[
            Block(
                path=f"{stack}.{index}",
                stack=stack,
                index=index,
                kind=type(module).__name__,
                streams=(),
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                flops=0,
                outputs=0,
                reason=NOT_RUN,
            )
            for stack in stacks
            for index, module in enumerate(lists[stack])
        ],
        flows={},
        config_keys={stack: keys[stack] for stack in stacks},
    )
