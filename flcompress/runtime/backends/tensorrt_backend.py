"""TensorRT, and TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.backend import TransformerFiles
from flcompress.core.records import EngineManifest, Record
from flcompress.runtime.backends.export_backend import ExportBackend

if TYPE_CHECKING:
    from flcompress.runtime.tensorrt_session import TensorRTSession


class TensorRTBackend(ExportBackend):
    """TensorRT: the engine, by the TensorRT that built it.

    Attributes:
        cuda_graph: whether a call is one CUDA graph.
    """

    name: ClassVar[str] = "tensorrt"
    label: ClassVar[str] = "TensorRT"
    export: ClassVar[str] = "tensorrt"
    record: ClassVar[type[Record]] = EngineManifest

    cuda_graph: bool = Field(False, description="launch each step as one CUDA graph")

    @override
    def require(self) -> None:
        from flcompress.runtime.tensorrt_session import require_gpu

        require_gpu()

    @override
    def verify(self, files: TransformerFiles) -> None:
        """Require the builder and the card of the engine, and its SHA-256."""
        from flcompress.runtime.tensorrt_api import card_here
        from flcompress.runtime.tensorrt_session import require_builder

        # First, since the file to be hashed is as large as the weights.
        require_builder(self.manifest(files).dump(), card_here())
        super().verify(files)

    @override
    def session(self, folder: Path, manifest: Mapping[str, Any]) -> TensorRTSession:
        """Load the engine; see `ExportBackend.session`."""
        from flcompress.runtime.tensorrt_session import TensorRTSession

        return TensorRTSession(folder / str(manifest["file"]), manifest, cuda_graph=self.cuda_graph)
