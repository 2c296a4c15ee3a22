"""Checks, before a long export starts, of what would end it late; every message says how to fix it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import psutil

from flcompress.errors import RequestError
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.weights import DTYPES
from flcompress.models.families import family_of
from flcompress.models.loading import loaded_dtype, transformer_class
from flcompress.models.shards import folder_tensors
from flcompress.runtime.sizes import Size, patch_of

FP16_KEYS = 65_504
"""Largest fp16 number; a softmax that sums more keys than that in fp16 can overflow."""

TENSOR_ELEMENTS = 2**31
"""TensorRT takes no tensor with as many elements."""

ONNX_MEMORY = (1.2e9, 1.3)
TENSORRT_MEMORY = (1.0e9, 3.2)
TORCH_TENSORRT_MEMORY = {"whole": (1.3e9, 4.6), "block": (1.4e9, 1.2)}
"""Peak memory in bytes: a constant, and a multiple of the weights' bytes. See docs/benchmarks/exports.md."""


def weight_bytes(folder: Path, precision: ExportPrecision) -> int:
    """Bytes of a transformer's weights at a precision, from the headers of its files."""
    factory = transformer_class(folder)
    stored = folder_tensors(folder).items()
    return sum(
        math.prod(tensor.shape) * loaded_dtype(name, factory, DTYPES[precision]).itemsize for name, tensor in stored
    )


def attention_tokens(config: dict[str, Any], size: Size, text: int) -> int:
    """Keys of the longest attention: the latents' tokens, and the text's where both are attended to at once."""
    over_time, over_space = patch_of(config)
    tokens = -(-size.frames // over_time) * (size.height // over_space) * (size.width // over_space)
    return tokens + text if family_of(config["_class_name"]).attends_to_text else tokens


def check_keys(precision: ExportPrecision, tokens: int, what: str, setting: str = "onnx.precision") -> None:
    """Raise RequestError where an fp16 softmax can overflow.

    Args:
        precision: asked for.
        tokens: keys of the longest attention.
        what: the size, for the message.
        setting: key of the precision in a recipe, for the message.
    """
    if precision == "fp16" and tokens > FP16_KEYS:
        raise RequestError(
            f"{setting}: fp16 given, but {what} is {tokens:,} tokens and an fp16 softmax overflows past "
            f"{FP16_KEYS:,} keys; set {setting}: bf16"
        )


def check_scores(precision: ExportPrecision, heads: int, batch: int, tokens: int, what: str) -> None:
    """Raise RequestError if TensorRT would have to hold all attention scores at once.

    It fuses attention in fp16 and bf16 only.
    """
    elements = batch * heads * tokens * tokens
    if precision == "fp32" and elements >= TENSOR_ELEMENTS:
        raise RequestError(
            f"tensorrt: {what} is {tokens:,} tokens, whose fp32 attention scores are {elements:,} elements of one "
            f"tensor, and TensorRT takes fewer than {TENSOR_ELEMENTS:,}; it fuses attention in half precision only: "
            "set onnx.precision: bf16"
        )


def check_room(what: str, folder: Path, disk: int, memory: int, setting: str = "onnx.precision") -> None:
    """Raise RequestError where the disk or the memory of this machine is too small.

    Args:
        what: the exporter.
        folder: the folder that it writes to.
        disk: bytes it writes.
        memory: bytes it holds at its peak.
        setting: key of the precision in a recipe, for the message.
    """
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise RequestError(
            f"{what}: {_gb(disk)} of disk needed, {_gb(free)} free at {folder}; free some, or give --run-dir on "
            "another disk"
        )
    available = psutil.virtual_memory().available
    if available < memory:
        raise RequestError(
            f"{what}: about {_gb(memory)} of memory needed, {_gb(available)} available; close other programs, set "
            f"{setting}: bf16, or run 'flcompress export' on a larger machine"
        )


def peak_memory(weights: int, model: tuple[float, float]) -> int:
    """Return the peak memory in bytes for N bytes of weights."""
    constant, factor = model
    return int(constant + factor * weights)


def heads_of(config: dict[str, Any]) -> int:
    """Return the number of attention heads."""
    return int(config["num_attention_heads"])


def describe_size(size: Size) -> str:
    """Return a latent size in words, for messages."""
    return f"{size.frames} x {size.height} x {size.width} of latents"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
