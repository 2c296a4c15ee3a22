"""Export a pipeline folder that stock diffusers loads, with the scheduler and call arguments of the contract."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from flcompress.core.program import Program
from flcompress.core.records import Quantization
from flcompress.core.steps import Exporter
from flcompress.progress import ProgressSink


class DiffusersExporter(Exporter):
    """`diffusers: {precision: bf16}`: RUN/exports/diffusers, for the stock pipeline; safetensors only.

    Attributes:
        precision: of the transformers' weights; what diffusers keeps in fp32 stays fp32.
        quantize: the linear layers of the blocks in 8 bits; the rest stays in bf16.
    """

    name: ClassVar[str] = "diffusers"
    version: ClassVar[int] = 2
    added: ClassVar[tuple[str, ...]] = ("precision", "quantize")

    precision: Literal["bf16"] | None = Field(
        default=None, description="of the transformers' weights, half the bytes of fp32; null: as they are stored"
    )

    quantize: Quantization | None = Field(
        default=None,
        description="the blocks' linear layers in 8 bits, by torchao; needs precision: bf16. `fp8`: weights and "
        "activations, for GPUs from sm89 on; `int8`: weights alone, which saves memory on any machine",
    )

    @model_validator(mode="after")
    def _in_bf16(self) -> Self:
        if self.quantize is not None and self.precision is None:
            raise ValueError(
                f"quantize: {self.quantize} given without a precision, but what is not quantised computes in bf16; set "
                "precision: bf16"
            )
        return self

    @override
    def check(self) -> None:
        """Require torchao where it is to quantise."""
        if self.quantize is not None:
            from flcompress.runtime.torch_session import require_torchao

            require_torchao(f"diffusers.quantize: {self.quantize}")

    @override
    def fingerprint(self) -> str:
        by = f", torchao {version('torchao')}" if self.quantize is not None else ""
        return f"diffusers {version('diffusers')}{by}"

    @override
    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        from flcompress.exporters.shared.pipeline_folder import write_pipeline

        return write_pipeline(program, folder, progress, self.precision, self.quantize)
