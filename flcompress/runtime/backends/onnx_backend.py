"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.records import OnnxManifest, Record
from flcompress.runtime.backends.export_backend import ExportBackend
from flcompress.runtime.onnx_providers import Provider

if TYPE_CHECKING:
    from flcompress.runtime.onnx_session import OnnxSession

CACHE_FOLDER = ".cache"
"""Folder inside an export of what providers build from it: its manifest does not name it, and it goes with it."""


class OnnxBackend(ExportBackend):
    """ONNX Runtime, on the GPU where both a driver and an ONNX Runtime built for it are installed, else on the CPU.

    Attributes:
        provider: what runs the graph.
        graph_optimization: what ONNX Runtime rewrites in the graph when it loads it.
    """

    name: ClassVar[str] = "onnx"
    label: ClassVar[str] = "ONNX Runtime"
    export: ClassVar[str] = "onnx"
    record: ClassVar[type[Record]] = OnnxManifest

    provider: Provider | None = Field(
        None, description="what runs the graph; default: cuda where ONNX Runtime and the machine have it, else cpu"
    )
    graph_optimization: Literal["all", "basic", "off"] = Field(
        "all", description="what ONNX Runtime fuses and rewrites in the graph when it loads it"
    )

    @override
    def require(self) -> None:
        from flcompress.runtime.onnx_providers import require_onnxruntime

        require_onnxruntime(f"backend {self.name}", self.provider)

    @override
    def session(self, folder: Path, manifest: Mapping[str, Any], *, lean: bool = False) -> OnnxSession:
        """Load the graph; see `ExportBackend.session`. With `lean`, as `OnnxSession` explains, for a large model."""
        from flcompress.runtime.onnx_providers import best_provider
        from flcompress.runtime.onnx_session import OnnxSession

        provider = self.provider or best_provider()
        return OnnxSession(
            folder / str(manifest["file"]),
            provider,
            lean=lean,
            precision=str(manifest.get("precision", "fp32")),
            optimization=self.graph_optimization,
            cache=cache_folder(folder, provider),
        )


def cache_folder(export: Path, provider: Provider) -> Path | None:
    """Make the folder for what a provider builds, one for each version; None without such, or on a read-only disk."""
    if provider not in ("tensorrt", "nv-tensorrt-rtx"):
        return None
    import onnxruntime

    cache = export / CACHE_FOLDER / f"{provider}-{onnxruntime.__version__}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return cache
