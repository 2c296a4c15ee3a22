"""TensorRT, and TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from flcompress.core.records import EngineManifest, Record
from flcompress.runtime.backends.export_backend import ExportBackend

if TYPE_CHECKING:
    from flcompress.runtime.tensorrt_session import TensorRTSession


class TensorRTBackend(ExportBackend):
    """TensorRT: the engine, by the TensorRT that built it."""

    name: ClassVar[str] = "tensorrt"
    label: ClassVar[str] = "TensorRT"
    export: ClassVar[str] = "tensorrt"
    record: ClassVar[type[Record]] = EngineManifest

    @override
    def require(self) -> None:
        from flcompress.runtime.tensorrt_session import require_gpu

        require_gpu()

    @override
    def session(self, folder: Path, manifest: Mapping[str, Any]) -> TensorRTSession:
        """Load the engine; see `ExportBackend.session`."""
        from flcompress.runtime.tensorrt_session import TensorRTSession

        return TensorRTSession(folder / str(manifest["file"]), manifest)
