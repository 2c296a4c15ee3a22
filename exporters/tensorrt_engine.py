"""Export a serialized TensorRT engine, built from the ONNX export; for RTX cards on a machine without a GPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.errors import UnavailableError
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.tensorrt_build.profiles import Profile, Targets, require_precision
from flcompress.progress import ProgressSink
from flcompress.runtime.tensorrt_api import (
    CURRENT,
    MODULES,
    RTX_TARGETS,
    Builder,
    Card,
    builder_for,
    capabilities,
    card_here,
    installed,
    load_tensorrt,
)


class TensorRTExporter(Exporter):
    """`tensorrt: {targets: [sm89]}`: RUN/exports/tensorrt/model.engine and manifest.json.

    Attributes:
        precision: what the engine computes in: the ONNX export's precision.
        targets: GPU generations the engine runs on (sm89 is Ada, RTX 40; sm90 is Hopper, H100), or "current" alone: the
            GPU of this machine.
        profiles: ranges of sizes that it takes, such as `{batch: [1, 1, 2], frames: [17, 81, 81], height: [480, 480,
            720]}`, in the units of the clip.
        builder: the package that builds it.
        stream_weights: whether a card may hold a part of the weights and read the others from host memory.
        refit: whether the next export of the same graph replaces the engine's weights instead of building one.
    """

    name: ClassVar[str] = "tensorrt"
    after: ClassVar[tuple[str, ...]] = ("onnx",)
    added: ClassVar[tuple[str, ...]] = ("builder", "stream_weights", "refit")

    version: ClassVar[int] = 2

    precision: ExportPrecision | None = Field(
        default=None, description="what the engine computes in; null: as onnx.precision, which it has to equal"
    )
    targets: Targets = Field(
        default=("sm89",), description="GPU generations, or 'current' alone for the GPU of this machine"
    )
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)] = Field(
        default=(Profile(),),
        description="ranges of batch, frames, height and width that the engine takes, each [smallest, tuned for, "
        "largest], in frames and pixels of the clip; default: the recipe's own size",
    )
    builder: Builder | None = Field(
        default=None,
        description="`tensorrt-rtx` builds for sm80, sm86, sm89, sm120 and sm121 on any machine, `tensorrt` for the "
        "GPU of this machine; null: by the targets",
    )
    stream_weights: bool = Field(
        default=False,
        description="build an engine that reads weights from host memory during a run where the GPU has too little",
    )
    refit: bool = Field(
        default=False,
        description="build an engine whose weights the next export of the same graph replaces (a new student, a merged "
        "LoRA), without a build; needs an NVIDIA GPU",
    )

    @model_validator(mode="after")
    def _one_builder(self) -> Self:
        others = [target for target in self.targets if target not in (*RTX_TARGETS, CURRENT)]
        if others and self.builder == "tensorrt-rtx":
            raise ValueError(
                f"builder: tensorrt-rtx and targets: {', '.join(self.targets)} given, but it does not build for "
                f"{', '.join(others)}; set builder: tensorrt"
            )
        if len(self.targets) > 1 and (others or self.builder == "tensorrt"):
            raise ValueError(
                f"targets: {', '.join(self.targets)} given, but tensorrt builds for the GPU of one machine, and "
                f"tensorrt-rtx for {', '.join(RTX_TARGETS)} alone; name one target"
            )
        return self

    @override
    def check(self) -> None:
        """Require a builder that can build for the targets on this machine."""
        card = card_here()
        if self.targets == (CURRENT,) and card is None:
            raise UnavailableError(
                "tensorrt.targets: current given, but this machine has no CUDA driver; name the GPU that the engine is "
                "for, such as targets: [sm89]"
            )
        builder = self.builder or builder_for(self.targets, card)
        self._check_targets(builder, card)
        if not installed(builder):
            raise UnavailableError(f"tensorrt: {self._missing(builder, card)}")
        trt = load_tensorrt(MODULES[builder])
        if builder == "tensorrt-rtx":
            capabilities(trt, self.targets)
        if self.refit and card is None:
            raise UnavailableError(
                "tensorrt.refit: true given, but this machine has no CUDA driver, and an engine whose weights can be "
                "replaced is built with one only; leave refit out, or export on a machine with an NVIDIA GPU"
            )
        if self.precision is not None:
            require_precision(self.precision, self.targets, card)

    @property
    def module(self) -> str:
        """The module of the builder."""
        return MODULES[self.builder or builder_for(self.targets, card_here())]

    @override
    def fingerprint(self) -> str:
        trt = load_tensorrt(self.module)
        card = card_here() if self.targets == (CURRENT,) else None
        return " ".join([trt.__name__, trt.__version__, *([card.target] if card else [])])

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.tensorrt_build.export import TensorRTExport

        self.check()
        export = TensorRTExport(
            precision=self.precision,
            targets=self.targets,
            profiles=self.profiles,
            module=self.module,
            stream_weights=self.stream_weights,
            refit=self.refit,
        )
        return export.write(program, folder, exports, progress)

    def _check_targets(self, builder: Builder, card: Card | None) -> None:
        """Raise UnavailableError where the builder makes no engine for the targets on this machine."""
        target = self.targets[0]
        if builder == "tensorrt-rtx":
            if target == CURRENT and card is not None and card.target not in RTX_TARGETS:
                raise UnavailableError(
                    f"tensorrt.targets: current is {card}, which tensorrt-rtx does not build for (it knows "
                    f"{', '.join(RTX_TARGETS)}); leave builder out and pip install 'flcompress[tensorrt]'"
                )
        elif target != CURRENT and (card is None or card.target != target):
            here = f"that is {card}" if card else "is none"
            raise UnavailableError(
                f"tensorrt.targets: {target} given, but tensorrt builds for the GPU of this machine alone, and here "
                f"{here}; export it on a machine with that GPU, or name one that tensorrt-rtx builds for: "
                f"{', '.join(RTX_TARGETS)}"
            )

    def _missing(self, builder: Builder, card: Card | None) -> str:
        target = f"{CURRENT} ({card})" if self.targets == (CURRENT,) else ", ".join(self.targets)
        more = " (258 MB, builds engines without a GPU)" if builder == "tensorrt-rtx" else ""
        return (
            f"{MODULES[builder]} is not installed, which builds for {target}; pip install 'flcompress[{builder}]'{more}"
            ", or take 'tensorrt' out of the recipe's exports"
        )
