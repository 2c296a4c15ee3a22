"""PyTorch, eagerly and through torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from flcompress.core.backend import STOCK_EXPORT, Backend, OpenNetwork, TransformerFiles

if TYPE_CHECKING:
    from flcompress.runtime.torch_session import TorchSession


class TorchBackend(Backend):
    """PyTorch, one operation after the other.

    Attributes:
        precision: what it computes in.
    """

    name: ClassVar[str] = "torch"
    label: ClassVar[str] = "torch eager"
    export: ClassVar[str] = STOCK_EXPORT

    precision: Literal["fp32", "fp16", "bf16"] | None = Field(
        None, description="what torch computes in; default: bf16 on a GPU, fp32 on a CPU"
    )

    @override
    def require(self) -> None:
        from flcompress.runtime.torch_session import best_device, require_precision

        if self.precision is not None:
            require_precision(self.precision, best_device())

    @override
    def verify(self, files: TransformerFiles) -> None:
        """Require what quantised weights need."""
        from flcompress.runtime.torch_session import best_device, require_quantized

        require_quantized(files.stock, best_device(), self.precision)

    @override
    def open(self, files: TransformerFiles) -> OpenNetwork:
        return _opened(self._session(files))

    def _session(self, files: TransformerFiles) -> TorchSession:
        from flcompress.runtime.torch_session import TorchSession, best_device

        return TorchSession(files.stock, best_device(), files.guidance, self.precision)


class CompileBackend(TorchBackend):
    """PyTorch, every block compiled by torch.compile (its regional compilation)."""

    name: ClassVar[str] = "compile"
    label: ClassVar[str] = "torch.compile"

    @override
    def require(self) -> None:
        from flcompress.runtime.torch_session import best_device, require_compiler

        super().require()
        require_compiler(best_device())

    @override
    def open(self, files: TransformerFiles) -> OpenNetwork:
        return _opened(self._session(files).compiled())

    @override
    def open_beside(self, files: TransformerFiles, eager: OpenNetwork) -> OpenNetwork:
        from flcompress.runtime.torch_session import TorchSession

        assert isinstance(eager.network, TorchSession)
        return _opened(eager.network.compiled())


def _opened(session: TorchSession) -> OpenNetwork:
    return OpenNetwork(network=session, precision=session.precision, weight_bytes=session.nbytes, device=session.device)
