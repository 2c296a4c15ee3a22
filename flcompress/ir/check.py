"""The invariants of a block graph; violations are listed in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flcompress.ir.block import Block, Flow

if TYPE_CHECKING:
    import networkx as nx


def faults(blocks: Sequence[Block], graph: nx.DiGraph[str], *, parameters: int, flops: int) -> list[str]:
    """Return the faults in words; empty if there are none."""
    return [
        *_names(blocks, graph),
        *_order(blocks),
        *_sums(blocks, parameters=parameters, flops=flops),
        *_reach(blocks, graph),
        *(fault for block in blocks for fault in _block(block)),
        *_edges(blocks, graph),
    ]


def _names(blocks: Sequence[Block], graph: nx.DiGraph[str]) -> Iterator[str]:
    if not blocks:
        yield "it has no blocks"
    paths = [block.path for block in blocks]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"path '{path}' is used {paths.count(path)} times, expected once"
    for node in sorted(set(graph) - {"input", "output", *paths}):
        yield f"an edge names '{node}', which is no block"


def _order(blocks: Sequence[Block]) -> Iterator[str]:
    indices: dict[str, list[int]] = {}
    for block in blocks:
        indices.setdefault(block.stack, []).append(block.index)
        if block.path != f"{block.stack}.{block.index}":
            yield f"'{block.path}' is not entry {block.index} of stack '{block.stack}'"
    for stack, positions in indices.items():
        if positions != list(range(len(positions))):
            yield f"stack '{stack}' runs its indices as {positions}, expected 0 to {len(positions) - 1} in order"


def _sums(blocks: Sequence[Block], *, parameters: int, flops: int) -> Iterator[str]:
    for what, total, parts in (
        ("parameters", parameters, [block.parameters for block in blocks]),
        ("flops", flops, [block.flops for block in blocks]),
    ):
        if min(parts, default=0) < 0:
            yield f"a block has negative {what}"
        if sum(parts) > total:
            yield f"the blocks' {what} sum to {sum(parts):,}, more than the model's {total:,}"


def _reach(blocks: Sequence[Block], graph: nx.DiGraph[str]) -> Iterator[str]:
    import networkx as nx

    if not nx.is_directed_acyclic_graph(graph):
        yield f"data flows in a circle: {' -> '.join(edge[0] for edge in nx.find_cycle(graph))}"
    fed, used = nx.descendants(graph, "input"), nx.ancestors(graph, "output")
    for block in blocks:
        if block.path not in fed:
            yield f"'{block.path}' cannot be reached from the input"
        if block.path not in used:
            yield f"'{block.path}' does not reach the output"


def _block(block: Block) -> Iterator[str]:
    for what, values in (
        ("input", [stream.input for stream in block.streams]),
        ("output", [stream.output for stream in block.streams]),
    ):
        if len(set(values)) < len(values):
            yield f"'{block.path}' uses one {what} for two streams"
    for stream in block.streams:
        if not 0 <= stream.output < max(block.outputs, 1):
            yield f"'{block.path}' has no output {stream.output} for stream '{stream.input}'"
    if block.importance is not None:
        score = block.importance
        levels = [number for level in score.per_level for number in level]
        if not all(map(math.isfinite, [score.mean, score.standard_error, *levels])):
            yield f"'{block.path}' has an importance that is not finite"


def _edges(blocks: Sequence[Block], graph: nx.DiGraph[str]) -> Iterator[str]:
    carried = {(block.path, str(stream.output)): stream.spec for block in blocks for stream in block.streams}
    for source, target, data in graph.edges(data=True):
        flows: tuple[Flow, ...] = data["flows"]
        if not flows:
            yield f"nothing flows from '{source}' to '{target}'"
        for flow in flows:
            spec = carried.get((source, flow.source), flow.spec)
            if spec != flow.spec:
                yield f"output {flow.source} of '{source}' is {spec}, but {flow.spec} flows to '{target}'"
