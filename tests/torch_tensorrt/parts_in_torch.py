"""The parts of a Torch-TensorRT export, run by torch before each is built: what the engines compute, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from flcompress.core.program import Program
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.weights import DTYPES
from flcompress.exporters.torch_tensorrt_build import export
from flcompress.exporters.torch_tensorrt_build.build import build_engine
from flcompress.exporters.torch_tensorrt_build.parts import Part
from flcompress.models.loading import load_transformer
from flcompress.runtime.inputs import OUTPUT, Denoiser, arguments_of, constants_of, tensors_of
from flcompress.runtime.sizes import size_of


class PartsInTorch:
    """Takes every part on its way to the builder, and hands its tensors on to the next as a session does."""

    def __init__(self, program: Program, precision: ExportPrecision) -> None:
        self._program, self._precision = program, precision
        self._arguments = arguments_of(program)(size_of(program, batch=1), [500.0], 1)
        self._values = tensors_of(self._arguments)

    def before(self, build_engine: Callable[..., Any]) -> Callable[..., Any]:
        """Return `build_engine`, with the part run by torch before it is built."""

        def build(part: Part, names: Mapping[fx.Node, str], *rest: Any) -> Any:
            with torch.no_grad():
                results = part.module(*(self._values[names[node]] for node in part.inputs))
            self._values |= zip((names[node] for node in part.outputs), results, strict=True)
            return build_engine(part, names, *rest)

        return build

    def difference(self) -> float:
        """Return the largest absolute difference from the transformer at the same precision, once all have run."""
        dtype = DTYPES[self._precision]
        transformer = load_transformer(self._program.components["transformer"], "cpu", dtype)
        denoiser = Denoiser(transformer, constants_of(self._arguments), dtype).eval()
        with torch.no_grad():
            expected: Tensor = denoiser(tensors_of(self._arguments))
        return float((self._values[OUTPUT] - expected).abs().max())


def watched(program: Program, precision: ExportPrecision, patch: pytest.MonkeyPatch) -> PartsInTorch:
    """Return what runs the parts of this program's next export while `patch` is in force."""
    parts = PartsInTorch(program, precision)
    patch.setattr(export, "build_engine", parts.before(build_engine))
    return parts
