"""Autocast as a GPU has it, on tensors that say they are on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

IN_FP32 = frozenset(
    {"__pow__", "cosine_similarity", "exp", "group_norm", "layer_norm", "log", "log_softmax", "norm", "normalize",
     "pow", "reciprocal", "rms_norm", "rsqrt", "softmax", "softplus"}
)  # fmt: skip
"""Functions of torch, by name, that CUDA's autocast computes in fp32 and the CPU's in the dtype of their input."""


class CudaAutocast(TorchFunctionMode):
    """Give CPU tensors CUDA's autocast while the CPU's is enabled: norms, powers and softmax in fp32.

    The lists of functions that become bf16 are the same for what transformers are made of: products, convolutions and
    attention. Without a GPU, fake tensors of the device cuda have no autograd.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _exact, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
