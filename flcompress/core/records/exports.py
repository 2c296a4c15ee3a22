"""What exporters leave in an export's own folder."""

from __future__ import annotations

from typing import Any

from pydantic import FiniteFloat

from flcompress.core.records.base import Record
from flcompress.core.records.run import Number


class FactsFile(Record):
    """`flcompress.json` of a pipeline folder: how its clips are sampled, and what was cut."""

    contract: dict[str, Any]
    call: dict[str, Any]
    parameters: int
    kept: dict[str, str]
    latents: list[int]
    frame_rate: Number
    pipeline_class: str


class OnnxManifest(Record):
    """`manifest.json` of an ONNX export; differences are the largest absolute ones."""

    file: str
    sha256: dict[str, str]
    opset: int
    producer: str
    precision: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    dynamic: list[str]
    parameters: int
    tolerance: FiniteFloat
    difference: FiniteFloat
    magnitude: FiniteFloat
    difference_to_fp32: FiniteFloat
    torch_difference_to_fp32: FiniteFloat
    cases: int
    checked: dict[str, Any]
    contract: dict[str, Any]
    kept: dict[str, str]


class EngineManifest(Record):
    """`manifest.json` of a TensorRT engine; `difference` is None where no GPU here can run it.

    Of the optional keys, `card` is the GPU behind the target "current", `graph` the digest of the ONNX graph of an
    engine whose weights can be replaced, `refitted` the hash of the engine that they were put into, `checked` the sizes
    that were compared.
    """

    file: str
    sha256: str
    bytes: int
    builder: dict[str, str]
    targets: list[str]
    precision: str
    profiles: list[dict[str, Any]]
    shapes: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    timesteps: list[Number]
    sigmas: list[Number]
    shift: Number
    guidance_scale: Number
    contract: dict[str, Any]
    kept: dict[str, str]
    source: dict[str, str]
    checked_on_gpu: bool
    difference: FiniteFloat | None
    tolerance: FiniteFloat
    card: dict[str, str] | None = None
    stream_weights: bool = False
    graph: str | None = None
    refitted: str | None = None
    checked: dict[str, Any] | None = None
