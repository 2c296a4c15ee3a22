"""The text form against its golden file, the JSON against damage, the hash against every change."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flcompress.errors import RecordError, RequestError
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import content_hash, from_json, to_json
from flcompress.ir.text import to_text
from tests.ir.graphs import two_stacks

GOLDEN = Path(__file__).parents[1] / "golden" / "two_stacks.txt"


def scored() -> BlockGraph:
    graph = two_stacks(2, 2)
    level = (0.0, 0.5, 0.125, 0.0625)
    graph = graph.with_importance({"joint.1": Estimate(mean=0.125, standard_error=0.03125, per_level=(level,))})
    single = graph.block("single.1")
    return graph.with_blocks([replace(single, removable=False, reason="the last block differs")])


def test_text_is_the_golden_one() -> None:
    assert to_text(scored()) == GOLDEN.read_text(encoding="utf-8")


def test_json_is_read_back_exactly() -> None:
    graph = scored()
    assert from_json(to_json(graph)) == graph
    assert to_json(from_json(to_json(graph))) == to_json(graph)
    assert re.fullmatch("[0-9a-f]{64}", content_hash(graph))


BLOCK = scored().block("joint.1")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Other"},
        {"parameters": 99},
        {"flops": 99},
        {"importance": None},
        {"importance": Estimate(mean=0.125, standard_error=0.03125)},
        {"removable": True},
        {"reason": "because"},
        {"outputs": 3},
        {"streams": BLOCK.streams[:1]},
    ],
)
def test_hash_follows_every_field_of_a_block(change: dict[str, Any]) -> None:
    graph = scored()
    assert content_hash(graph.with_blocks([replace(BLOCK, **change)])) != content_hash(graph)


def test_hash_does_not_tell_an_int_from_its_float() -> None:
    one, other = (two_stacks(1, 1).with_importance({"joint.0": Estimate(mean=n, standard_error=0)}) for n in (1, 1.0))
    assert content_hash(one) == content_hash(other)
    assert from_json(to_json(one)) == other


def _damaged(change: Any) -> str:
    document = json.loads(to_json(scored()))
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("blocks"), "graph lacks 'blocks'"),
        (lambda d: d.update(extra=1), "graph has unknown keys: extra"),
        (lambda d: d.update(version=0), "graph.version is 0, expected 1; write it again with this flcompress"),
        (lambda d: d.update(parameters=1.5), "graph.parameters is float, expected int"),
        (lambda d: d.update(parameters=True), "graph.parameters is bool, expected int"),
        (lambda d: d.update(config_keys={"joint": 1}), "graph.config_keys.joint is int, expected str"),
        (lambda d: d["blocks"].append(3), "graph.blocks[4] is int, expected dict"),
        (lambda d: d["blocks"][1].pop("kind"), "graph.blocks[1] lacks 'kind'"),
        (lambda d: d["blocks"][1].update(size=3), "graph.blocks[1] has unknown keys: size"),
        (
            lambda d: d["blocks"][1]["importance"].update(per_level=[[0.0]]),
            "graph.blocks[1].importance.per_level holds [0.0], expected four numbers",
        ),
        (
            lambda d: d["blocks"][0]["streams"][0]["spec"].update(shape=["x"]),
            "graph.blocks[0].streams[0].spec.shape[0] is str, expected int",
        ),
        (
            lambda d: d["blocks"][1]["importance"].update(per_level=[["x", 0.5, 0.5, 0.5]]),
            "graph.blocks[1].importance.per_level holds ['x', 0.5, 0.5, 0.5], expected four numbers",
        ),
        (lambda d: d["blocks"][1].update(importance=[]), "graph.blocks[1].importance is list, expected dict"),
        (lambda d: d["blocks"][1].update(removable="no"), "graph.blocks[1].removable is str, expected bool"),
        (lambda d: d["blocks"][1].update(streams=3), "graph.blocks[1].streams is int, expected list"),
        (lambda d: d["edges"][0].update(zoo=1, extra=1), "graph.edges[0] has unknown keys: extra, zoo"),
        (
            lambda d: d["blocks"][0].update(index=1),
            "block graph of TwoStacks: 'joint.0' is not entry 1 of stack 'joint'",
        ),
    ],
)
def test_damaged_json_is_refused(change: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        from_json(_damaged(change))


def test_a_newer_graph_is_refused_by_name() -> None:
    newer = _damaged(lambda d: d.update(version=2, extra=1))
    message = "run/graph.json: written by a newer flcompress: format 2, this one reads up to 1; update flcompress"
    with pytest.raises(RecordError, match=f"^{re.escape(message)}$"):
        from_json(newer, "run/graph.json")


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^block graph is not JSON: Expecting value: line 1 column 1 \(char 0\)$"):
        from_json("graph")
    with pytest.raises(RequestError, match=r"^graph is list, expected dict$"):
        from_json("[]")
