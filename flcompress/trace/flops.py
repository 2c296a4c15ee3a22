"""FLOPs of one forward, block by block; of a weightless model too, at any size of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flcompress.ir.graph import BlockGraph
from flcompress.trace.on_meta import runnable_on_meta


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, and the attention kernel of the CPU, which is the one that it leaves out."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _flash_on_cpu})


def count_flops(model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """FLOPs of one forward on `inputs`, whole batch: of everything, and of each module at `paths` (its calls added up).

    On the meta device nothing is computed and no activation takes memory. Raises what the forward raises.
    """
    counter = flop_counter()
    started: dict[str, int] = {}
    spent = dict.fromkeys(paths, 0)

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            started[path] = counter.get_total_flops()

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spent[path] += counter.get_total_flops() - started[path]

        return hook

    with ExitStack() as hooks, torch.no_grad(), runnable_on_meta():
        for path in spent:
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(before(path)).remove)
            hooks.callback(module.register_forward_hook(after(path)).remove)
        with counter:
            model(**inputs)
    return counter.get_total_flops(), spent


def with_flops(graph: BlockGraph, model: nn.Module, inputs: Mapping[str, Any]) -> BlockGraph:
    """The graph of `model` with the FLOPs of a forward on `inputs`, which hold one sample."""
    total, spent = count_flops(model, [block.path for block in graph.blocks], inputs)
    return BlockGraph(
        model_class=graph.model_class,
        parameters=graph.parameters,
        flops=total,
        blocks=[replace(block, flops=spent[block.path]) for block in graph.blocks],
        flows=graph.flows,
        config_keys=graph.config_keys,
    )


def _flash_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
