"""BlockGraph: look-ups, rewrites as properties, and every fault that `verify` names."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.errors import PostconditionError, RequestError
from flcompress.ir.block import Block, Estimate, Flow, TensorSpec
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import content_hash, from_json, to_json
from tests.ir.graphs import SPEC, TEXT, block, two_stacks


@st.composite
def graphs_and_paths(draw: st.DrawFn) -> tuple[BlockGraph, list[str], list[str]]:
    """A graph and two disjoint sets of its blocks that leave one block at least."""
    graph = two_stacks(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    paths = draw(st.permutations([one.path for one in graph.blocks]))
    cut = draw(st.integers(0, len(paths) - 1))
    middle = draw(st.integers(0, cut))
    return graph, list(paths[:middle]), list(paths[middle:cut])


@settings(max_examples=60, deadline=None)
@given(graphs_and_paths())
def test_removing_in_two_steps_is_removing_at_once(case: tuple[BlockGraph, list[str], list[str]]) -> None:
    graph, first, second = case
    names = graph.renamed(first)
    stepwise = graph.without(first).without([names[path] for path in second])
    assert stepwise == graph.without([*first, *second])


@settings(max_examples=60, deadline=None)
@given(graphs_and_paths())
def test_a_smaller_graph_holds_and_is_read_back_exactly(case: tuple[BlockGraph, list[str], list[str]]) -> None:
    graph, gone, _ = case
    smaller = graph.without(gone)
    smaller.verify()
    assert smaller.parameters == graph.parameters - 100 * len(gone)
    assert smaller.flops == graph.flops - 200 * len(gone)
    assert from_json(to_json(smaller)) == smaller
    assert content_hash(from_json(to_json(smaller))) == content_hash(smaller)
    assert (content_hash(smaller) == content_hash(graph)) == (not gone)


def test_removal_reindexes_and_reconnects() -> None:
    graph = two_stacks(3, 2)
    assert graph.renamed(["joint.1"]) == {
        "joint.0": "joint.0",
        "joint.2": "joint.1",
        "single.0": "single.0",
        "single.1": "single.1",
    }
    smaller = graph.without(["joint.2", "single.0"])
    assert smaller.flows["joint.1", "single.0"] == (
        Flow(source="0", target="hidden_states", spec=TEXT),
        Flow(source="1", target="hidden_states", spec=SPEC),
    )
    assert list(smaller.stacks) == ["joint", "single"]
    assert graph.without([]) == graph


def test_scores_are_attached_by_path() -> None:
    graph = two_stacks(1, 1).with_importance({"single.0": Estimate(mean=1, standard_error=0.5)})
    assert graph.block("joint.0").importance is None
    assert graph.block("single.0").importance == Estimate(mean=1.0, standard_error=0.5)
    changed = graph.with_blocks([replace(graph.block("joint.0"), removable=True)])
    assert changed.block("joint.0").removable is True
    assert changed != graph


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["joint.7"], "TwoStacks has no block 'joint.7'; nearest: joint.1, joint.0, single.0"),
        (["joint.0", "joint.1", "single.0"], "all 3 blocks of TwoStacks were to be removed; keep at least one"),
    ],
)
def test_refused_removals(paths: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        two_stacks(2, 1).without(paths)


def test_a_block_without_a_stream_stays() -> None:
    graph = two_stacks(1, 1)
    graph = graph.with_blocks([replace(graph.block("single.0"), streams=())])
    message = "'single.0' carries no residual stream, so nothing flows around it; keep it"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        graph.without(["single.0"])


def _chain(blocks: list[Block], **changes: Any) -> BlockGraph:
    places = ["input", *(one.path for one in blocks), "output"]
    flow = Flow(source="0", target="hidden_states", spec=SPEC)
    arguments: dict[str, Any] = {
        "model_class": "M",
        "parameters": 1000,
        "flops": 1000,
        "blocks": blocks,
        "flows": {edge: [flow] for edge in pairwise(places)},
    }
    return BlockGraph(**(arguments | changes))


FLOW = Flow(source="0", target="hidden_states", spec=SPEC)
WRONG = Flow(source="0", target="hidden_states", spec=TEXT)
A, B = block("a", 0), block("a", 1)


@pytest.mark.parametrize(
    ("graph", "fault"),
    [
        (_chain([]), "it has no blocks"),
        (_chain([A, B], parameters=150), "the blocks' parameters sum to 200, more than the model's 150"),
        (_chain([A, B], flops=300), "the blocks' flops sum to 400, more than the model's 300"),
        (_chain([block("a", 0, parameters=-1)]), "a block has negative parameters; a block has negative flops"),
        (_chain([B]), "stack 'a' runs its indices as [1], expected 0 to 0 in order"),
        (_chain([B, A]), "stack 'a' runs its indices as [1, 0], expected 0 to 1 in order"),
        (_chain([replace(A, path="b.0")]), "'b.0' is not entry 0 of stack 'a'"),
        (
            _chain([A, B], flows={("input", "a.0"): [FLOW], ("a.0", "output"): [FLOW]}),
            "'a.1' cannot be reached from the input; 'a.1' does not reach the output",
        ),
        (
            _chain([A], flows={("input", "a.0"): [FLOW], ("a.0", "output"): [WRONG]}),
            "output 0 of 'a.0' is float32[1, 6, 8], but float32[1, 4, 8] flows to 'output'",
        ),
        (_chain([A], flows={("input", "a.0"): [], ("a.0", "output"): [FLOW]}), "nothing flows from 'input' to 'a.0'"),
        (
            _chain([A], flows={("input", "a.0"): [FLOW], ("a.0", "output"): [FLOW], ("a.0", "x"): [FLOW]}),
            "an edge names 'x', which is no block",
        ),
        (
            _chain([replace(A, importance=Estimate(mean=float("nan"), standard_error=0.0))]),
            "'a.0' has an importance that is not finite",
        ),
        (
            _chain([replace(A, streams=(replace(A.streams[0], output=1),))]),
            "'a.0' has no output 1 for stream 'hidden_states'",
        ),
        (_chain([replace(A, streams=A.streams * 2)]), "'a.0' uses one input for two streams; 'a.0' uses one output"),
    ],
)
def test_verify_names_the_fault(graph: BlockGraph, fault: str) -> None:
    with pytest.raises(PostconditionError, match=f"^block graph of M: {re.escape(fault)}"):
        graph.verify()


def test_verify_names_a_circle_and_a_double_path() -> None:
    flows = {("input", "a.0"): [FLOW], ("a.0", "a.1"): [FLOW], ("a.1", "a.0"): [FLOW], ("a.1", "output"): [FLOW]}
    with pytest.raises(PostconditionError, match=r"data flows in a circle: a\.0 -> a\.1"):
        _chain([A, B], flows=flows).verify()
    with pytest.raises(PostconditionError, match=r"path 'a\.0' is used 2 times, expected once"):
        _chain([A, A], flows={("input", "a.0"): [FLOW], ("a.0", "output"): [FLOW]}).verify()


def test_the_graph_is_a_frozen_value() -> None:
    graph = two_stacks(1, 1)
    assert hash(graph) == hash(two_stacks(1, 1))
    assert graph != "graph"
    assert repr(graph) == "BlockGraph(TwoStacks, 2 blocks, 1,200 parameters)"
    assert str(TensorSpec(shape=(), dtype="int64")) == "int64[]"
    with pytest.raises(Exception, match="Frozen graph"):
        graph.graph.remove_node("joint.0")
