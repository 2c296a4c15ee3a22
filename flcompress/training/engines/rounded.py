"""Weights that FSDP2 gathers as autocast would round them.

Under autocast a linear layer computes with its weight rounded to bf16. So each process may round its part before it is
gathered, as well as the whole afterwards: half the bytes, the same bits. What autocast leaves in fp32 (norms,
modulation tables) is gathered in fp32 in the same exchange; FSDP2's `MixedPrecisionPolicy` knows one dtype for all
parameters of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flcompress.errors import TrainingError
from flcompress.training.parts import local

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.as_strided.default)


class Rounded(torch.Tensor):
    """A gathered weight: bf16 in memory, fp32 to autograd, so that its gradients are summed in fp32.

    Autocast's cast returns what is in memory. Anything else that reads the weight is an error: it would compute with
    rounded numbers what other engines compute with exact ones.
    """

    half_precision: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _SAME:
            return _wrapped(func(args[0].half_precision, *args[1:], **options))
        if func is torch.ops.aten._to_copy.default and options.get("dtype") is torch.bfloat16:
            return torch.ops.aten.alias.default(args[0].half_precision)
        raise TrainingError(
            f"training.engine: fsdp2 gathers the weights of linear layers in bf16, but {func} reads one outside of "
            "autocast; set engine: zero2, or precision: fp32"
        )


def _wrapped(half: torch.Tensor) -> Rounded:
    weight: Rounded = torch.Tensor._make_wrapper_subclass(
        Rounded, half.shape, strides=half.stride(), dtype=torch.float32, device=half.device
    )
    weight.half_precision = half
    return weight


def gather_rounded(model: nn.Module) -> None:
    """Gather the weights of a sharded model's linear layers in bf16; its forwards must be under autocast."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            part: Any = module.weight._local_tensor  # where FSDP2 looks for these two
            part.fsdp_pre_all_gather, part.fsdp_post_all_gather = _rounded_part, _whole


def _rounded_part(
    mesh: Any, size: torch.Size, stride: Any, module: Any, policy: Any
) -> tuple[tuple[torch.Tensor], None]:
    """Return what this process sends of a weight of `size`: as many rows as every other one, the last ones padding."""
    part = local(module.weight)
    sent = part.new_zeros((-(-size[0] // mesh.size()), *size[1:]), dtype=torch.bfloat16)
    sent[: len(part)].copy_(part)
    return (sent,), None


def _whole(
    gathered: tuple[torch.Tensor], metadata: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> tuple[Rounded, tuple[()]] | None:
    """Return the gathered weight; after the first time its memory has been filled already."""
    return None if out is not None else (_wrapped(gathered[0]), ())
