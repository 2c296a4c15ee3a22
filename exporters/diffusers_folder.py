"""Export a pipeline folder that stock diffusers loads, with the scheduler and call arguments of the contract."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.progress import ProgressSink


class DiffusersExporter(Exporter):
    """`diffusers: {precision: bf16}`: RUN/exports/diffusers, for the stock pipeline; safetensors only.

    Attributes:
        precision: of the transformers' weights; what diffusers keeps in fp32 stays fp32.
    """

    name: ClassVar[str] = "diffusers"
    version: ClassVar[int] = 2
    added: ClassVar[tuple[str, ...]] = ("precision",)

    precision: Literal["bf16"] | None = Field(
        default=None, description="of the transformers' weights, half the bytes of fp32; null: as they are stored"
    )

    @override
    def fingerprint(self) -> str:
        return f"diffusers {version('diffusers')}"

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.shared.pipeline_folder import write_pipeline

        return write_pipeline(program, folder, progress, self.precision)
