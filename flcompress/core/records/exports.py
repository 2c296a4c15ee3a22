"""What exporters leave in an export's own folder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import FiniteFloat

from flcompress.core.records.base import Record
from flcompress.core.records.run import ContractPart, Number

Quantization = Literal["fp8", "int8"]
"""Weights and activations in fp8, or weights in int8; one scale a row."""


class FactsFile(Record):
    """`flcompress.json` of a pipeline folder: how its clips are sampled, and what was cut.

    Folders of before `frame_rate` was noted have their family's. Where the weights were stored in another `precision`,
    `difference` is the largest absolute one of an output at it from the stored weights' in fp32, of values up to
    `magnitude`. Of transformers that are quantised, `quantized` and `unquantized` name each one's linear layers that
    are and that are not (`*` is a block's index), and `transformer_bytes` is the size of all their weights.
    """

    contract: ContractPart
    call: dict[str, Any]
    parameters: int
    kept: dict[str, str]
    latents: list[int]
    frame_rate: Number | None = None
    pipeline_class: str
    precision: Literal["bf16"] | None = None
    quantize: Quantization | None = None
    quantized: dict[str, list[str]] | None = None
    unquantized: dict[str, list[str]] | None = None
    transformer_bytes: int | None = None
    difference: FiniteFloat | None = None
    magnitude: FiniteFloat | None = None


class ExportManifest(Record):
    """`manifest.json` of any export: what each of them states; one that states more has a record of its own."""

    file: str
    sha256: str | dict[str, str]
    precision: str
    contract: ContractPart
    kept: dict[str, str]


class OnnxManifest(Record):
    """`manifest.json` of an ONNX export; differences are the largest absolute ones."""

    file: str
    sha256: dict[str, str]
    opset: int
    producer: str
    precision: Literal["fp32", "fp16", "bf16"]
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
    contract: ContractPart
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
    precision: Literal["fp32", "fp16", "bf16"]
    profiles: list[dict[str, Any]]
    shapes: list[dict[str, dict[str, list[int]]]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    timesteps: list[Number]
    sigmas: list[Number]
    shift: Number
    guidance_scale: Number
    contract: ContractPart
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


class TorchTensorRTManifest(Record):
    """`manifest.json` of engines of Torch-TensorRT; `difference` is None where no GPU here can run them.

    Each of `engines` states its file, the names of the tensors that it takes and returns, and the blocks that it
    computes; they run in order, `file` first. `in_torch` lists the operators that no engine computes. Of the optional
    keys, `card` is the GPU behind the target "current", `checked` the sizes that were compared.
    """

    file: str
    sha256: dict[str, str]
    bytes: int
    builder: dict[str, str]
    targets: list[str]
    precision: Literal["fp32", "fp16", "bf16"]
    engine: Literal["whole", "block"]
    engines: list[dict[str, Any]]
    operators: int
    in_torch: list[str]
    profiles: list[dict[str, Any]]
    shapes: list[dict[str, dict[str, list[int]]]]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    timesteps: list[Number]
    sigmas: list[Number]
    shift: Number
    guidance_scale: Number
    contract: ContractPart
    kept: dict[str, str]
    checked_on_gpu: bool
    difference: FiniteFloat | None
    tolerance: FiniteFloat
    card: dict[str, str] | None = None
    checked: dict[str, Any] | None = None
