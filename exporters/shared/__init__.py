"""Parts that the exporters share: parity with torch, preflight checks, weights read one at a time, the model card."""

from typing import Literal

ExportPrecision = Literal["fp32", "fp16", "bf16"]

Attention = Literal["plain", "fused"]
"""Attention in an ONNX graph: products and a softmax, or the one operator."""

TOLERANCES: dict[ExportPrecision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
"""Largest absolute difference from torch at the same precision. A bf16 number has eight times the rounding of an fp16
one (8 bits against 11)."""
