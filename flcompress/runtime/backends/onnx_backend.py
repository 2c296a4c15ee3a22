"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.records import OnnxManifest, Record
from flcompress.runtime.backends.export_backend import ExportBackend

if TYPE_CHECKING:
    from flcompress.runtime.onnx_session import OnnxSession


class OnnxBackend(ExportBackend):
    """ONNX Runtime, on the GPU where both a driver and an ONNX Runtime built for it are installed, else on the CPU.

    Attributes:
        provider: what runs the graph.
    """

    name: ClassVar[str] = "onnx"
    label: ClassVar[str] = "ONNX Runtime"
    export: ClassVar[str] = "onnx"
    record: ClassVar[type[Record]] = OnnxManifest

    provider: Literal["cpu", "cuda"] | None = Field(
        None, description="what runs the graph; default: the GPU where ONNX Runtime has one, else the CPU"
    )

    @override
    def require(self) -> None:
        from flcompress.runtime.onnx_session import require_onnxruntime

        require_onnxruntime(f"backend {self.name}")

    @override
    def session(self, folder: Path, manifest: Mapping[str, Any], *, lean: bool = False) -> OnnxSession:
        """Load the graph; see `ExportBackend.session`. With `lean`, as `OnnxSession` explains, for a large model."""
        from flcompress.runtime.onnx_session import OnnxSession, best_provider

        return OnnxSession(folder / str(manifest["file"]), self.provider or best_provider(), lean=lean)
