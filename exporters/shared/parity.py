"""The comparison that every exported denoiser has to pass: the same inputs through torch and through the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flcompress.core.program import Program
from flcompress.errors import PostconditionError
from flcompress.exporters.shared import ExportPrecision, preflight
from flcompress.exporters.shared.weights import DTYPES, stream_weights
from flcompress.models.configs import check_transformer_config
from flcompress.runtime.inputs import Arguments, Denoiser, Inputs, Session, tensors_of
from flcompress.runtime.sizes import Size, size_of, sizes_of, step_of

TIMESTEPS = 4
"""Timesteps of a contract that are compared, at most."""

CHECKED_UP_TO = 2048
"""Tokens above which a CPU takes minutes for one call of a large model: then a smaller clip is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """The result of a comparison.

    Attributes:
        difference: largest absolute difference over all cases.
        magnitude: largest absolute value of the reference, to judge the difference by.
        tolerance: what the recipe allows.
        cases: how many inputs were compared.
    """

    difference: float
    magnitude: float
    tolerance: float
    cases: int

    def require(self, what: str, fix: str) -> Parity:
        """Return self if within tolerance; else, or if the difference is not a number, raise PostconditionError."""
        if self.difference <= self.tolerance:
            return self
        raise PostconditionError(
            f"{what}: differs from torch by {self.difference:.3g} at most, over {self.cases} cases "
            f"(values up to {self.magnitude:.3g}); expected at most {self.tolerance:g}; {fix}"
        )


def comparable_size(program: Program) -> Size:
    """Return the size that the program is sampled at if a CPU can compare it soon, else a small clip of one sample."""
    size, step = size_of(program), step_of(program)
    config = check_transformer_config(program.components["transformer"])
    if sizes_of(program).fixed or preflight.attention_tokens(config, size, 0) <= CHECKED_UP_TO:
        return size  # learned positions have one size
    frames = min(size.frames, 2 * max(step.frames, 1))
    return replace(size, frames=frames, height=4 * step.height, width=6 * step.width)


def cases(make: Arguments, timesteps: Sequence[float], sizes: Sequence[Size]) -> list[dict[str, torch.Tensor]]:
    """Inputs at every size, each from a seed of its own, at up to 4 of a contract's timesteps, first and last included.

    The samples of a batch stand at different timesteps, so that an export that reads only the first one is caught.
    """
    count = min(TIMESTEPS, len(timesteps))
    picks = [timesteps[index * (len(timesteps) - 1) // max(count - 1, 1)] for index in range(count)]
    inputs: list[dict[str, torch.Tensor]] = []
    for seed, size in enumerate(sizes):
        levels = [picks[-(seed + index) % len(picks)] for index in range(size.batch)]
        inputs.append(tensors_of(make(size, levels, seed)))
    return inputs


@torch.no_grad()
def outputs(session: Session, all_inputs: Sequence[Inputs]) -> list[torch.Tensor]:
    """The session's output for every case, on the CPU in fp32."""
    return [session(inputs).float().cpu() for inputs in all_inputs]


def compare(reference: Sequence[torch.Tensor], exported: Sequence[torch.Tensor], tolerance: float) -> Parity:
    """Largest absolute difference between two lists of outputs; not a number where either holds one.

    Raises:
        PostconditionError: a shape differs.
    """
    differences: list[torch.Tensor] = []
    for index, (expected, output) in enumerate(zip(reference, exported, strict=True)):
        if expected.shape != output.shape:
            raise PostconditionError(
                f"case {index}: output {list(output.shape)} given, expected {list(expected.shape)}"
            )
        differences.append((expected - output).abs().max())
    return Parity(
        difference=float(torch.stack(differences).max()),
        magnitude=float(torch.stack([expected.abs().max() for expected in reference]).max()),
        tolerance=tolerance,
        cases=len(differences),
    )


def reference(
    folder: Path,
    constants: Mapping[str, Any],
    precision: ExportPrecision,
    all_inputs: Sequence[Inputs],
    device: str = "cpu",
) -> list[Tensor]:
    """Return the stock transformer's outputs, on the CPU in fp32; its weights are read layer by layer.

    Args:
        folder: the transformer's.
        constants: forward arguments that are not tensors.
        precision: precision of weights and arithmetic, by diffusers' own rule.
        all_inputs: the inputs of every case.
        device: what computes.
    """
    denoiser = Denoiser(stream_weights(folder, precision, device), constants, DTYPES[precision]).eval()
    with WideSums(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is to mean fp32
        return outputs(
            lambda inputs: denoiser({name: tensor.to(device) for name, tensor in inputs.items()}), all_inputs
        )


class WideSums(TorchFunctionMode):
    """Linear layers in fp16 on a CPU add up in fp32 and round once.

    So does torch's own kernel, and a GPU; but few CPUs multiply fp16, and without that its kernel takes four times as
    long as this.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and args[0].dtype is torch.float16 and args[0].device.type == "cpu":
            wide = [arg if arg is None else arg.float() for arg in args]
            return func(*wide, **(kwargs or {})).half()
        return func(*args, **(kwargs or {}))
