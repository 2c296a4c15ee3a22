"""Export the denoiser to ONNX, checked against torch through ONNX Runtime."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.exporters.shared import Attention, ExportPrecision
from flcompress.progress import ProgressSink


class OnnxExporter(Exporter):
    """`onnx: {precision: bf16}`: RUN/exports/onnx/model.onnx and its manifest.json.

    Attributes:
        precision: precision of weights and arithmetic; timestep, guidance and what diffusers keeps in fp32 stay fp32.
        tolerance: largest absolute difference of the output from torch's, at the same precision, that is let through.
        attention: "fused" for ONNX Runtime on a GPU, which runs the one operator by flash attention.
    """

    name: ClassVar[str] = "onnx"
    version: ClassVar[int] = 3
    added: ClassVar[tuple[str, ...]] = ("attention",)

    precision: ExportPrecision = Field(
        default="fp32", description="of weights and arithmetic; inputs and output are fp32"
    )
    tolerance: float | None = Field(
        default=None,
        gt=0.0,
        description="largest absolute difference from torch at the same precision, > 0; null: 1e-4 in fp32, 1e-2 in "
        "fp16, 8e-2 in bf16",
    )
    attention: Attention = Field(
        default="plain",
        description="'fused' writes it as the one operator that ONNX Runtime runs by flash attention on a GPU; engines "
        "of TensorRT are built from 'plain'",
    )

    @override
    def check(self) -> None:
        """Require ONNX Runtime, which checks every export."""
        from flcompress.runtime.onnx_providers import require_onnxruntime

        require_onnxruntime("onnx")
        if self.attention == "fused":
            from flcompress.exporters.onnx_graph.attention import require_fused_attention

            require_fused_attention()

    @override
    def fingerprint(self) -> str:
        return " ".join(f"{package} {version(package)}" for package in ("torch", "onnx", "onnxscript"))

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.onnx_graph.export import OnnxExport

        export = OnnxExport(self.precision, self.tolerance, self.fingerprint(), self.attention)
        return export.write(program, folder, exports / self.name, progress)
