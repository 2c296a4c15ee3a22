"""Blocks and the data that flows between them, over `networkx.DiGraph`.

Never in this file: torch, module objects, weights. A graph is a value; every change gives a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING

from flcompress.errors import PostconditionError, RequestError
from flcompress.ir.block import Block, Estimate, Flow, Stream
from flcompress.ir.check import faults

if TYPE_CHECKING:
    import networkx as nx

INPUT = "input"
OUTPUT = "output"
CLIP = "hidden_states"

Edge = tuple[str, str]


class BlockGraph:
    """The blocks of a model in execution order, and the tensors that flow from one to the next.

    Nodes are "input", every block by its path, and "output"; an edge holds its tensors as `flows`.
    """

    __slots__ = ("_by_path", "blocks", "config_keys", "flops", "graph", "model_class", "parameters")

    def __init__(
        self,
        *,
        model_class: str,
        parameters: int,
        flops: int,
        blocks: Iterable[Block],
        flows: Mapping[Edge, Iterable[Flow]],
        config_keys: Mapping[str, str] | None = None,
    ) -> None:
        """`parameters` and `flops` (one sample) are the whole model's; `config_keys` names each stack's count."""
        import networkx as nx  # as slow to import as pydantic, and a check of a recipe makes no graph

        self.model_class = model_class
        self.parameters = parameters
        self.flops = flops
        self.blocks = tuple(blocks)
        self.config_keys: Mapping[str, str] = MappingProxyType(dict(sorted((config_keys or {}).items())))
        self._by_path = {block.path: block for block in self.blocks}
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from([INPUT, *self._by_path, OUTPUT])
        for (source, target), tensors in flows.items():
            graph.add_edge(source, target, flows=tuple(sorted(set(tensors), key=_flow_order)))
        self.graph: nx.DiGraph[str] = nx.freeze(graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockGraph) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash((self.model_class, self.parameters, self.flops, self.blocks))

    def __repr__(self) -> str:
        return f"BlockGraph({self.model_class}, {len(self.blocks)} blocks, {self.parameters:,} parameters)"

    def _value(self) -> tuple[object, ...]:
        return (self.model_class, self.parameters, self.flops, self.blocks, dict(self.config_keys), self.flows)

    @property
    def flows(self) -> dict[Edge, tuple[Flow, ...]]:
        """The tensors on every edge, by (producer, consumer)."""
        return {(source, target): data["flows"] for source, target, data in self.graph.edges(data=True)}

    @property
    def stacks(self) -> dict[str, tuple[Block, ...]]:
        """The blocks of every list of modules, lists in the order they first run."""
        stacks: dict[str, tuple[Block, ...]] = {}
        for block in self.blocks:
            stacks[block.stack] = (*stacks.get(block.stack, ()), block)
        return stacks

    def block(self, path: str) -> Block:
        """The block at `path`; RequestError, naming the nearest paths, where there is none."""
        if path in self._by_path:
            return self._by_path[path]
        nearest = get_close_matches(path, self._by_path, n=3, cutoff=0.0)
        raise RequestError(f"{self.model_class} has no block '{path}'; nearest: {', '.join(nearest) or 'none'}")

    def clip_streams(self) -> dict[str, Stream]:
        """Return the stream of the latents' tokens in every block that they pass on their way to the output, in order.

        Blocks of text alone are not among them. Diffusers names this stream alike in all classes.
        """
        passed: list[tuple[str, Stream]] = []
        path = self.blocks[-1].path
        while path in self._by_path:
            named = (stream for stream in self._by_path[path].streams if stream.input == CLIP)
            if (stream := next(named, None)) is None:
                break
            passed.append((path, stream))
            into = (edge[0] for edge, flows in self.flows.items() if edge[1] == path and _carry(flows, CLIP))
            path = next(into, INPUT)
        return dict(reversed(passed))

    def renamed(self, paths: Iterable[str]) -> dict[str, str]:
        """Where every kept block will live once `paths` are gone: {old path: new path}, in execution order."""
        gone = {self.block(path).path for path in paths}
        new: dict[str, str] = {}
        for stack, blocks in self.stacks.items():
            remaining = sorted((block for block in blocks if block.path not in gone), key=lambda block: block.index)
            new |= {block.path: f"{stack}.{index}" for index, block in enumerate(remaining)}
        return {block.path: new[block.path] for block in self.blocks if block.path in new}

    def without(self, paths: Iterable[str]) -> BlockGraph:
        """The graph with `paths` acting as identities and their lists re-indexed.

        Raises RequestError on an unknown path, on a block that carries no stream, and when no block would stay.
        """
        gone = {path: self.block(path) for path in paths}
        new = self.renamed(gone)
        if not new:
            raise RequestError(f"all {len(gone)} blocks of {self.model_class} were to be removed; keep at least one")
        flows = {edge: set(tensors) for edge, tensors in self.flows.items()}
        for block in gone.values():
            if not block.streams:
                raise RequestError(f"'{block.path}' carries no residual stream, so nothing flows around it; keep it")
            _bypass(flows, block)
        names = {INPUT: INPUT, OUTPUT: OUTPUT} | new
        remaining = (block for block in self.blocks if block.path in new)
        return BlockGraph(
            model_class=self.model_class,
            parameters=self.parameters - sum(block.parameters for block in gone.values()),
            flops=self.flops - sum(block.flops for block in gone.values()),
            blocks=[
                replace(block, path=new[block.path], index=int(new[block.path].rpartition(".")[2]))
                for block in remaining
            ],
            flows={(names[source], names[target]): tensors for (source, target), tensors in flows.items()},
            config_keys=self.config_keys,
        )

    def with_blocks(self, blocks: Iterable[Block]) -> BlockGraph:
        """The graph with some blocks, matched by path, replaced, and as much larger or smaller as they are.

        Raises RequestError on an unknown path.
        """
        updated = {self.block(block.path).path: block for block in blocks}
        return BlockGraph(
            model_class=self.model_class,
            parameters=self.parameters
            + sum(block.parameters - self.block(path).parameters for path, block in updated.items()),
            flops=self.flops + sum(block.flops - self.block(path).flops for path, block in updated.items()),
            blocks=[updated.get(block.path, block) for block in self.blocks],
            flows=self.flows,
            config_keys=self.config_keys,
        )

    def with_importance(self, importance: Mapping[str, Estimate]) -> BlockGraph:
        """The graph with new scores for the named blocks; RequestError on an unknown path."""
        return self.with_blocks(replace(self.block(path), importance=score) for path, score in importance.items())

    def with_temporal_attention(self, attention: Mapping[str, Estimate]) -> BlockGraph:
        """The graph with new temporal attentions of the named blocks; RequestError on an unknown path."""
        return self.with_blocks(replace(self.block(path), temporal_attention=mass) for path, mass in attention.items())

    def verify(self) -> None:
        """Raise PostconditionError, naming every fault, unless the graph is one a pass may be given."""
        problems = faults(self.blocks, self.graph, parameters=self.parameters, flops=self.flops)
        if problems:
            raise PostconditionError(f"block graph of {self.model_class}: {'; '.join(problems)}")


def _carry(flows: Iterable[Flow], target: str) -> bool:
    return any(flow.target == target for flow in flows)


def _flow_order(flow: Flow) -> tuple[str, str, tuple[int, ...], str]:
    return flow.source, flow.target, flow.spec.shape, flow.spec.dtype


def _bypass(flows: dict[Edge, set[Flow]], block: Block) -> None:
    """Let what enters `block` on each residual stream go straight to what that stream's output fed."""
    into = {edge: flows.pop(edge) for edge in list(flows) if edge[1] == block.path}
    out_of = {edge: flows.pop(edge) for edge in list(flows) if edge[0] == block.path}
    for (producer, _), entering in into.items():
        for (_, consumer), leaving in out_of.items():
            joined = {flow for stream in block.streams for flow in _through(stream, entering, leaving)}
            if joined:
                flows.setdefault((producer, consumer), set()).update(joined)


def _through(stream: Stream, entering: set[Flow], leaving: set[Flow]) -> Iterable[Flow]:
    for before in entering:
        for after in leaving:
            if before.target == stream.input and after.source == str(stream.output):
                yield Flow(source=before.source, target=after.target, spec=before.spec)
