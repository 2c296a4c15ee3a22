"""The parts of a lowered graph that become an engine each: the whole, or one a block."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from flcompress.exporters.torch_tensorrt_build.lowering import is_operator, is_tensor, modules_of


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive operators of a graph.

    Attributes:
        module: they, with their weights; takes and returns tensors alone.
        inputs: nodes of the whole graph whose tensors it takes, in order.
        outputs: nodes of the whole graph whose tensors it returns, in order.
        blocks: paths of the blocks that it computes.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    blocks: tuple[str, ...]


def cut(graph: fx.GraphModule, blocks: Collection[str], *, each_block: bool) -> list[Part]:
    """Cut a graph into parts, to be run one after the other.

    Args:
        graph: as `lower` returns it.
        blocks: paths of the transformer's blocks.
        each_block: begin a new part at every block: what stands before the first block is a part, what stands after a
            block belongs to that block's part. Else the whole graph is one part.
    """
    groups: list[list[fx.Node]] = [[]]
    owned: dict[fx.Node, int] = {}
    names: list[list[str]] = [[]]
    for node in filter(is_operator, graph.graph.nodes):
        block = next((path for path in modules_of(node) if path in blocks), None)
        if block is not None and block not in names[-1]:
            if each_block and groups[-1]:
                groups.append([])
                names.append([])
            names[-1].append(block)
        # One of several results stays with what computes them.
        owner = owned[node.all_input_nodes[0]] if node.target is operator.getitem else len(groups) - 1
        groups[owner].append(node)
        owned[node] = owner
    return [
        _part(graph, nodes, number, owned, tuple(paths))
        for number, (nodes, paths) in enumerate(zip(groups, names, strict=True))
    ]


def _part(
    graph: fx.GraphModule, nodes: list[fx.Node], number: int, owned: Mapping[fx.Node, int], blocks: tuple[str, ...]
) -> Part:
    inputs: dict[fx.Node, None] = {}
    copied: dict[fx.Node, None] = {}

    def require(node: fx.Node) -> None:
        """A weight is copied, and so is a size, with what it is computed from: engines hand on tensors alone."""
        if owned.get(node) == number or node in copied or node in inputs:
            return
        if node.op == "get_attr" or (is_operator(node) and not is_tensor(node)):
            for source in node.all_input_nodes:
                require(source)
            copied[node] = None
        else:
            inputs[node] = None

    for node in nodes:
        for source in node.all_input_nodes:
            require(source)
    own, copies = fx.Graph(), {}
    for node in inputs:
        copies[node] = own.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in (*copied, *nodes):
        copies[node] = own.node_copy(node, copies.__getitem__)
    outputs = [
        node
        for node in nodes
        if is_tensor(node) and any(user.op == "output" or owned[user] != number for user in node.users)
    ]
    own.output(tuple(copies[node] for node in outputs))
    module = fx.GraphModule(graph, own)
    return Part(module=module, inputs=tuple(inputs), outputs=tuple(outputs), blocks=blocks)
