"""FLOPs of one forward, block by block; of a weightless model too, at any size of its inputs."""

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
    """FLOPs of one forward on `inputs`, whole batch: of everything, and of each module at `paths` (its calls added up).

    On the meta device nothing is computed, no activation takes memory, and of modules that are built and called alike
    one stands for all.

    Raises:
        RequestError: the model cannot run on these inputs.
    """
    counter = flop_counter()
    spent = dict.fromkeys(paths, 0)
    known: dict[str, tuple[Any, int]] = {}
    saved = 0

    def counting(path: str) -> Callable[..., Any]:
        module = model.get_submodule(path)
        stock = module.forward
        weightless = all(parameter.is_meta for parameter in module.parameters())

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal saved
            key = signature(module, Call(blank(args), blank(kwargs), None, 0)) if weightless else ""
            if key in known:
                output, flops = known[key]
                saved += flops
                output = tree_map(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, output)
            else:
                before = counter.get_total_flops()
                output = stock(*args, **kwargs)
                flops = counter.get_total_flops() - before
                if weightless:
                    known[key] = output, flops
            spent[path] += flops
            return output

        return forward

    with torch.no_grad(), runnable_on_meta(), replaced_forwards(model, {path: counting(path) for path in spent}):
        try:
            with counter:
                model(**inputs)
        except FORWARD_ERRORS as error:
            raise RequestError(f"{type(model).__name__} cannot run on these inputs: {first_line(error)}") from error
        return counter.get_total_flops() + saved, spent


def with_flops(graph: BlockGraph, model: nn.Module, inputs: Mapping[str, Any]) -> BlockGraph:
    """The graph with the parameters of `model`, which has its blocks, and the FLOPs of a forward on one sample."""
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
    """The block graph of a weightless model of a known family, with the FLOPs of a forward on `inputs`, of any size.

    The streams are found by running blocks, which takes time and memory: so at a small size, whose tensor specs they
    keep.
    """
    small = build(model, small_config(model)).eval()
    return with_flops(trace(small, example_inputs(small)), model, inputs)


NOT_RUN = "not traced: its streams are not known"


def listed_blocks(model: nn.Module) -> BlockGraph:
    """Blocks with their parameters, but without streams, edges and FLOPs (0): what the structure alone tells.

    Raises:
        RequestError: no list of modules is counted by an integer of the configuration.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    keys = count_keys(model, lists)
    stacks: list[str] = []
    for name in (one for one in lists if one in keys):  # parents come before their children
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
