"""Export a serialized TensorRT engine, built from the ONNX export; on a machine without a GPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.errors import UnavailableError
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.tensorrt_build.profiles import Profile, Target
from flcompress.progress import ProgressSink
from flcompress.runtime.tensorrt_api import builds_for_others, cuda_driver, load_tensorrt


class TensorRTExporter(Exporter):
    """`tensorrt: {targets: [sm89]}`: RUN/exports/tensorrt/model.engine and manifest.json.

    Attributes:
        precision: what the engine computes in: the ONNX export's precision.
        targets: GPU generations the engine runs on (sm89 is Ada, RTX 40), or "current" alone: the GPU of this machine.
        profiles: ranges of sizes that it takes, such as `{batch: [1, 1, 2], frames: [17, 81, 81], height: [480, 480,
            720]}`, in the units of the clip.
    """

    name: ClassVar[str] = "tensorrt"
    after: ClassVar[tuple[str, ...]] = ("onnx",)

    version: ClassVar[int] = 2

    precision: ExportPrecision | None = Field(
        default=None, description="what the engine computes in; null: as onnx.precision, which it has to equal"
    )
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = Field(
        default=("sm89",), description="GPU generations, or 'current' alone for the GPU of this machine"
    )
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)] = Field(
        default=(Profile(),),
        description="ranges of batch, frames, height and width that the engine takes, each [smallest, tuned for, "
        "largest], in frames and pixels of the clip; default: the recipe's own size",
    )

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError(f"a target is given twice: {', '.join(targets)}")
        if "current" in targets and len(targets) > 1:
            raise ValueError("'current' must stand alone; name the GPU generations instead")
        return targets

    @override
    def check(self) -> None:
        """Require a builder that can build for the targets on this machine."""
        trt = load_tensorrt()
        if not builds_for_others(trt) and self.targets != ("current",):
            raise UnavailableError(
                f"tensorrt.targets: {', '.join(self.targets)} given, but tensorrt {trt.__version__} builds for the GPU "
                "of this machine only; set targets: [current], or uninstall it and "
                "pip install 'flcompress[tensorrt-rtx]'"
            )
        if self.targets == ("current",) and not cuda_driver():
            raise UnavailableError(
                "tensorrt.targets: current given, but this machine has no CUDA driver; name the GPU that the engine is "
                "for, such as targets: [sm89]"
            )

    @override
    def fingerprint(self) -> str:
        trt = load_tensorrt()
        return f"{trt.__name__} {trt.__version__}"

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.tensorrt_build.export import TensorRTExport

        self.check()
        export = TensorRTExport(self.precision, self.targets, self.profiles)
        return export.write(program, folder, exports / "onnx", progress)
