"""JSON of a block graph and its content hash; what is written is read back exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flcompress.errors import PostconditionError, RecordError, RequestError
from flcompress.ir.block import Block, Estimate, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph
from flcompress.wording import newer_format

VERSION = 1


def to_json(graph: BlockGraph) -> str:
    """Canonical JSON: sorted keys, edges sorted by their ends, no NaN (ValueError)."""
    edges = [
        {"source": source, "target": target, "flows": [asdict(flow) for flow in flows]}
        for (source, target), flows in sorted(graph.flows.items())
    ]
    document = {
        "version": VERSION,
        "model_class": graph.model_class,
        "parameters": graph.parameters,
        "flops": graph.flops,
        "config_keys": dict(graph.config_keys),
        "blocks": [_plain(block) for block in graph.blocks],
        "edges": edges,
    }
    return json.dumps(document, sort_keys=True, allow_nan=False, indent=1) + "\n"


def _plain(block: Block) -> dict[str, Any]:
    """Return a block as JSON has it; one without temporal attention is written, and hashed, as before that existed."""
    values = asdict(block)
    if block.temporal_attention is None:
        del values["temporal_attention"]
    return values


def content_hash(graph: BlockGraph) -> str:
    """Full SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(to_json(graph).encode()).hexdigest()


def from_json(text: str, where: str = "graph.json") -> BlockGraph:
    """Return the graph that `to_json` wrote.

    Args:
        text: the content of the file.
        where: the file, to name in the message about a newer one.

    Raises:
        RequestError: damaged; names the key, what is there and what is expected.
        RecordError: written by a newer flcompress.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"block graph is not JSON: {error}") from error
    version = document.get("version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise RecordError(f"{where}: {newer_format(version, VERSION)}")
    try:
        record = _Graph.model_validate_json(text)
    except ValidationError as error:
        raise RequestError(_fault_in(error, document)) from error
    if record.version != VERSION:
        raise RequestError(
            f"graph.version is {record.version}, expected {VERSION}; write it again with this flcompress"
        )
    graph = record.graph()
    try:
        graph.verify()
    except PostconditionError as error:
        raise RequestError(str(error)) from error
    return graph


class _Part(BaseModel):
    # Built when a graph is first read: a check of a recipe imports this module and reads none.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class _Spec(_Part):
    shape: tuple[int, ...]
    dtype: str

    def spec(self) -> TensorSpec:
        return TensorSpec(shape=self.shape, dtype=self.dtype)


class _Stream(_Part):
    input: str
    output: int
    spec: _Spec

    def stream(self) -> Stream:
        return Stream(input=self.input, output=self.output, spec=self.spec.spec())


class _Flow(_Part):
    source: str
    target: str
    spec: _Spec

    def flow(self) -> Flow:
        return Flow(source=self.source, target=self.target, spec=self.spec.spec())


class _Edge(_Part):
    source: str
    target: str
    flows: list[_Flow]


class _Estimate(_Part):
    mean: float
    standard_error: float
    per_level: tuple[tuple[float, float, float, float], ...]

    def estimate(self) -> Estimate:
        return Estimate(mean=self.mean, standard_error=self.standard_error, per_level=self.per_level)


class _Block(_Part):
    path: str
    stack: str
    index: int
    kind: str
    streams: list[_Stream]
    parameters: int
    flops: int
    outputs: int
    silent: tuple[int, ...]
    importance: _Estimate | None
    temporal_attention: _Estimate | None = None
    removable: bool | None
    reason: str

    def block(self) -> Block:
        return Block(
            path=self.path,
            stack=self.stack,
            index=self.index,
            kind=self.kind,
            streams=tuple(stream.stream() for stream in self.streams),
            parameters=self.parameters,
            flops=self.flops,
            outputs=self.outputs,
            silent=self.silent,
            importance=None if self.importance is None else self.importance.estimate(),
            temporal_attention=None if self.temporal_attention is None else self.temporal_attention.estimate(),
            removable=self.removable,
            reason=self.reason,
        )


class _Graph(_Part):
    version: int
    model_class: str
    parameters: int
    flops: int
    config_keys: dict[str, str]
    blocks: list[_Block]
    edges: list[_Edge]

    def graph(self) -> BlockGraph:
        return BlockGraph(
            model_class=self.model_class,
            parameters=self.parameters,
            flops=self.flops,
            config_keys=self.config_keys,
            blocks=[block.block() for block in self.blocks],
            flows={(edge.source, edge.target): [flow.flow() for flow in edge.flows] for edge in self.edges},
        )


_KINDS = {"string": "str", "tuple": "list", "model": "dict"}
"""Python's names for the first words of pydantic's error types where they differ."""


def _fault_in(error: ValidationError, document: object) -> str:
    """Return the first fault in words: "graph.blocks[1].index is str, expected int"."""
    faults = error.errors(include_url=False)
    kind, loc = faults[0]["type"], faults[0]["loc"]
    *outer, last = loc or ("",)
    if outer and outer[-2:-1] == ["per_level"]:
        loc, kind = tuple(outer), "level"
    elif outer and outer[-1] == "per_level":
        kind = "level"
    if kind == "level":
        *outer, last = loc
        level: Any = document
        for part in loc:
            level = level[part]
        return f"{_key(outer)} holds {level}, expected four numbers"
    if kind == "missing":
        return f"{_key(outer)} lacks '{last}'"
    if kind == "extra_forbidden":
        unknown = [str(fault["loc"][-1]) for fault in faults if fault["type"] == kind and [*fault["loc"][:-1]] == outer]
        return f"{_key(outer)} has unknown keys: {', '.join(sorted(unknown))}"
    expected = kind.partition("_")[0]
    return f"{_key(loc)} is {type(faults[0]['input']).__name__}, expected {_KINDS.get(expected, expected)}"


def _key(loc: Sequence[int | str]) -> str:
    """Return a key's path: "graph.blocks[1].kind"."""
    return "graph" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
