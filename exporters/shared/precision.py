"""What an export computes in, and which parts stay in fp32 whatever the rest computes in."""

from __future__ import annotations

from typing import Any, Literal

import torch

Precision = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 8e-2}
"""Largest absolute difference from torch at the same precision. A bf16 number has eight times the rounding of an fp16
one (8 bits against 11)."""


def dtype_of(name: str, model_class: Any, precision: Precision) -> torch.dtype:
    """The type of a floating parameter, by the rule of diffusers' `from_pretrained(torch_dtype=...)`.

    Args:
        name: its full name.
        model_class: the diffusers class; its `_keep_in_fp32_modules` name the fp32 islands.
        precision: of the rest.
    """
    islands = set(model_class._keep_in_fp32_modules or ())
    return torch.float32 if islands & set(name.split(".")) else DTYPES[precision]
