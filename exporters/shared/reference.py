"""What torch answers at a precision: the reference that every export is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flcompress.exporters.shared.parity import Inputs, outputs
from flcompress.exporters.shared.precision import DTYPES, Precision
from flcompress.exporters.shared.weights import streamed
from flcompress.runtime.inputs import Denoiser


def reference(
    folder: Path, constants: Mapping[str, Any], precision: Precision, given: Sequence[Inputs]
) -> list[Tensor]:
    """The stock transformer's outputs on the CPU, in fp32, its weights read layer by layer.

    Args:
        folder: the transformer's.
        constants: forward arguments that are not tensors.
        precision: of weights and arithmetic, by diffusers' own rule.
        given: the cases.
    """
    denoiser = Denoiser(streamed(folder, precision), constants, DTYPES[precision]).eval()
    with WideSums():
        return outputs(lambda inputs: denoiser(dict(inputs)), given)


class WideSums(TorchFunctionMode):
    """Linear layers in fp16 on a CPU add up in fp32 and round once.

    So does torch's own kernel, and a GPU; but few CPUs multiply fp16, and without that its kernel takes four times as
    long as this.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and args[0].dtype is torch.float16 and args[0].device.type == "cpu":
            wide = [one if one is None else one.float() for one in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))
