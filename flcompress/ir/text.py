"""The readable form of a block graph: one header, then one line a block. Stable, so that it can be diffed."""

from __future__ import annotations

from flcompress.ir.block import Block, Estimate
from flcompress.ir.graph import BlockGraph

REMOVABLE = {None: "not certified", True: "removable", False: "not removable"}


def to_text(graph: BlockGraph) -> str:
    """The graph as text: totals, the config key of every stack, the blocks in execution order, ending in a newline."""
    lines = [f"{graph.model_class}: {len(graph.blocks)} blocks, {graph.parameters:,} parameters, {graph.flops:,} FLOPs"]
    for stack, blocks in graph.stacks.items():
        key = graph.config_keys.get(stack, "no config key")
        lines.append(f"stack {stack}: {len(blocks)} blocks, counted by {key}")
    lines += [_line(graph, block) for block in graph.blocks]
    lines.append(f"output <- {_sources(graph, 'output')}")
    return "\n".join(lines) + "\n"


def _line(graph: BlockGraph, block: Block) -> str:
    streams = ", ".join(str(stream) for stream in block.streams) or "no stream"
    parts = [
        f"{block.path} <- {_sources(graph, block.path)}",
        f"{block.kind}({streams})",
        f"{block.parameters:,} parameters",
        f"{block.flops:,} FLOPs",
        _score(block.importance),
        REMOVABLE[block.removable] + (f" ({block.reason})" if block.reason else ""),
    ]
    return " | ".join(parts)


def _sources(graph: BlockGraph, node: str) -> str:
    order = {path: position for position, path in enumerate(["input", *(block.path for block in graph.blocks)])}
    return ", ".join(sorted(graph.graph.predecessors(node), key=order.__getitem__)) or "nothing"


def _score(importance: Estimate | None) -> str:
    if importance is None:
        return "not scored"
    return f"importance {importance.mean:.6g} ± {importance.standard_error:.2g}"
