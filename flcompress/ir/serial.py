"""JSON of a block graph and its content hash; what is written is read back exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TypeVar

from flcompress.errors import PostconditionError, RequestError
from flcompress.ir.block import Block, Estimate, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph

VERSION = 1

T = TypeVar("T")


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
        "blocks": [asdict(block) for block in graph.blocks],
        "edges": edges,
    }
    return json.dumps(document, sort_keys=True, allow_nan=False, indent=1) + "\n"


def content_hash(graph: BlockGraph) -> str:
    """Full SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(to_json(graph).encode()).hexdigest()


def from_json(text: str) -> BlockGraph:
    """The graph that `to_json` wrote; RequestError, naming the place, on anything else."""
    try:
        document = _object(json.loads(text), "graph")
    except json.JSONDecodeError as error:
        raise RequestError(f"block graph is not JSON: {error}") from error
    top = _Reader(document, "graph")
    version = top.take("version", int)
    if version != VERSION:
        raise RequestError(f"graph.version is {version}, expected {VERSION}; write it again with this flcompress")
    graph = BlockGraph(
        model_class=top.take("model_class", str),
        parameters=top.take("parameters", int),
        flops=top.take("flops", int),
        config_keys={
            stack: _typed(key, str, f"graph.config_keys.{stack}")
            for stack, key in _object(top.take("config_keys", dict), "graph.config_keys").items()
        },
        blocks=top.each("blocks", _block),
        flows=dict(top.each("edges", _edge)),
    )
    top.finish()
    try:
        graph.verify()
    except PostconditionError as error:
        raise RequestError(str(error)) from error
    return graph


class _Reader:
    """Takes the keys of one JSON object, each with its type; `finish` refuses what nobody took."""

    def __init__(self, value: Mapping[str, object], place: str) -> None:
        self._left = dict(value)
        self._place = place

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self._left:
            raise RequestError(f"{self._place} lacks '{key}'")
        return _typed(self._left.pop(key), kind, f"{self._place}.{key}")

    def optional(self, key: str, kind: type[T]) -> T | None:
        if self._left.get(key, ...) is None:
            del self._left[key]
            return None
        return self.take(key, kind)

    def each(self, key: str, read: Callable[[_Reader], T]) -> list[T]:
        found: list[T] = []
        for place, value in enumerate(self.take(key, list)):
            reader = _Reader(_object(value, f"{self._place}.{key}[{place}]"), f"{self._place}.{key}[{place}]")
            found.append(read(reader))
            reader.finish()
        return found

    def one(self, key: str, read: Callable[[_Reader], T]) -> T:
        reader = _Reader(_object(self.take(key, dict), f"{self._place}.{key}"), f"{self._place}.{key}")
        value = read(reader)
        reader.finish()
        return value

    def one_or_none(self, key: str, read: Callable[[_Reader], T]) -> T | None:
        if self._left.get(key, ...) is None:
            del self._left[key]
            return None
        return self.one(key, read)

    def levels(self, key: str) -> tuple[tuple[float, float, float, float], ...]:
        found: list[tuple[float, float, float, float]] = []
        for level in self.take(key, list):
            if not isinstance(level, list) or len(level) != 4 or not all(isinstance(one, float) for one in level):
                raise RequestError(f"{self._place}.{key} holds {level}, expected four numbers")
            low, high, mean, standard_error = level
            found.append((low, high, mean, standard_error))
        return tuple(found)

    def numbers(self, key: str, kind: type[T]) -> tuple[T, ...]:
        values = self.take(key, list)
        return tuple(_typed(value, kind, f"{self._place}.{key}[{place}]") for place, value in enumerate(values))

    def finish(self) -> None:
        if self._left:
            raise RequestError(f"{self._place} has unknown keys: {', '.join(sorted(self._left))}")


def _typed(value: object, kind: type[T], place: str) -> T:
    # bool is an int to Python, but not to a reader of JSON.
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise RequestError(f"{place} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _object(value: object, place: str) -> dict[str, object]:
    return {str(key): item for key, item in _typed(value, dict, place).items()}


def _spec(reader: _Reader) -> TensorSpec:
    return TensorSpec(shape=reader.numbers("shape", int), dtype=reader.take("dtype", str))


def _stream(reader: _Reader) -> Stream:
    return Stream(input=reader.take("input", str), output=reader.take("output", int), spec=reader.one("spec", _spec))


def _flow(reader: _Reader) -> Flow:
    return Flow(source=reader.take("source", str), target=reader.take("target", str), spec=reader.one("spec", _spec))


def _edge(reader: _Reader) -> tuple[tuple[str, str], list[Flow]]:
    return (reader.take("source", str), reader.take("target", str)), reader.each("flows", _flow)


def _estimate(reader: _Reader) -> Estimate:
    return Estimate(
        mean=reader.take("mean", float),
        standard_error=reader.take("standard_error", float),
        per_level=reader.levels("per_level"),
    )


def _block(reader: _Reader) -> Block:
    return Block(
        path=reader.take("path", str),
        stack=reader.take("stack", str),
        index=reader.take("index", int),
        kind=reader.take("kind", str),
        streams=tuple(reader.each("streams", _stream)),
        parameters=reader.take("parameters", int),
        flops=reader.take("flops", int),
        outputs=reader.take("outputs", int),
        silent=reader.numbers("silent", int),
        importance=reader.one_or_none("importance", _estimate),
        removable=reader.optional("removable", bool),
        reason=reader.take("reason", str),
    )
