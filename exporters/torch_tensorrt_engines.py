"""Export engines that Torch-TensorRT builds from the traced forward itself; for RTX cards without a GPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.errors import UnavailableError
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.tensorrt_build.profiles import Profile, Targets, require_precision
from flcompress.progress import ProgressSink
from flcompress.runtime.tensorrt_api import CURRENT, RTX_TARGETS, card_here
from flcompress.runtime.torch_tensorrt_api import (
    PACKAGES,
    RTX,
    capability_of,
    installed_package,
    load_torch_tensorrt,
    versions,
)


class TorchTensorRTExporter(Exporter):
    """`torch-tensorrt: {precision: bf16}`: RUN/exports/torch-tensorrt/*.engine and manifest.json.

    Attributes:
        precision: precision of weights and arithmetic; timestep, guidance and what diffusers keeps in fp32 stay fp32.
        engine: what one engine computes: the whole transformer, or a block.
        targets: GPU generations that the engines run on, or "current" alone: the GPU of this machine.
        profiles: ranges of sizes that they take, in the units of the clip.
    """

    name: ClassVar[str] = "torch-tensorrt"

    precision: ExportPrecision = Field(
        default="fp32", description="of weights and arithmetic; inputs and output are fp32"
    )
    engine: Literal["whole", "block"] = Field(
        default="whole",
        description="what one engine computes; `block` builds with the memory of one block, and hands tensors on "
        "between engines",
    )
    targets: Targets = Field(
        default=(CURRENT,),
        description="'current' alone for the GPU of this machine; torch-tensorrt-rtx also builds for sm80, sm86, sm89, "
        "sm120 and sm121, on any machine",
    )
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)] = Field(
        default=(Profile(),),
        description="ranges of batch, frames, height and width that the engines take, each [smallest, tuned for, "
        "largest], in frames and pixels of the clip; default: the recipe's own size, for which all shapes are fixed",
    )

    @override
    def check(self) -> None:
        """Require a Torch-TensorRT that can build for the targets on this machine."""
        package, card = installed_package(), card_here()
        named = [target for target in self.targets if target != CURRENT]
        if not named and card is None:
            raise UnavailableError(
                "torch-tensorrt.targets: current given, but this machine has no CUDA driver; name the GPUs that the "
                "engines are for, such as targets: [sm89], which torch-tensorrt-rtx builds for without one"
            )
        if named and package != RTX:
            raise UnavailableError(
                f"torch-tensorrt.targets: {', '.join(named)} given, but {package} builds for the GPU of this machine "
                f"only; set targets: [current], or pip uninstall {package} and install 'flcompress[{RTX}]'"
            )
        wanted: list[str] = [*named] or ([card.target] if card else [])
        others = [target for target in wanted if target not in RTX_TARGETS]
        if package == RTX and others:
            raise UnavailableError(
                f"torch-tensorrt.targets: {', '.join(self.targets)} given, but {RTX} does not build for "
                f"{', '.join(others)}; pip uninstall it and install 'flcompress[{PACKAGES[0]}]', on a machine with "
                "that GPU"
            )
        require_precision(self.precision, self.targets, card, ("torch-tensorrt.targets", "torch-tensorrt.precision"))
        load_torch_tensorrt(capability_of(self.targets))

    @override
    def fingerprint(self) -> str:
        here = versions(load_torch_tensorrt(capability_of(self.targets)))
        card = card_here() if self.targets == (CURRENT,) else None
        parts = [f"{here['name']} {here['version']}", f"tensorrt {here['tensorrt']}", f"torch {here['torch']}"]
        return " ".join([*parts, *([card.target] if card else [])])

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.torch_tensorrt_build.export import TorchTensorRTExport

        self.check()
        export = TorchTensorRTExport(
            precision=self.precision, engine=self.engine, targets=self.targets, profiles=self.profiles
        )
        return export.write(program, folder, progress)
