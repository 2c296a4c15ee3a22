"""Torch-TensorRT, of either package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from flcompress.core.backend import TransformerFiles
from flcompress.core.records import Record, TorchTensorRTManifest
from flcompress.runtime.backends.export_backend import ExportBackend

if TYPE_CHECKING:
    from flcompress.runtime.torch_tensorrt_session import TorchTensorRTSession


class TorchTensorRTBackend(ExportBackend):
    """Torch-TensorRT: the engines, by the package and the TensorRT that built them."""

    name: ClassVar[str] = "torch-tensorrt"
    label: ClassVar[str] = "Torch-TensorRT"
    export: ClassVar[str] = "torch-tensorrt"
    record: ClassVar[type[Record]] = TorchTensorRTManifest

    @override
    def require(self) -> None:
        from flcompress.runtime.tensorrt_session import require_gpu
        from flcompress.runtime.torch_tensorrt_api import installed_package

        installed_package()
        require_gpu(self.name)

    @override
    def verify(self, files: TransformerFiles) -> None:
        """Require engines that fit their manifest, the builder and the card, and the SHA-256 of every file."""
        from flcompress.runtime.torch_tensorrt_session import require_runnable

        # First, since the files to be hashed are as large as the weights.
        require_runnable(self.manifest(files).dump(), files.export)
        super().verify(files)

    @override
    def session(self, folder: Path, manifest: Mapping[str, Any]) -> TorchTensorRTSession:
        """Load the engines; see `ExportBackend.session`."""
        from flcompress.runtime.torch_tensorrt_session import TorchTensorRTSession

        return TorchTensorRTSession(folder, manifest)
