"""PyTorch, eagerly and through torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from flcompress.core.backend import STOCK_EXPORT, Backend, OpenNetwork, TransformerFiles

if TYPE_CHECKING:
    from flcompress.runtime.torch_session import TorchSession


class TorchBackend(Backend):
    """PyTorch, one operation after the other."""

    name: ClassVar[str] = "torch"
    label: ClassVar[str] = "torch eager"
    export: ClassVar[str] = STOCK_EXPORT

    @override
    def open(self, files: TransformerFiles) -> OpenNetwork:
        return _opened(self._session(files))

    def _session(self, files: TransformerFiles) -> TorchSession:
        from flcompress.runtime.torch_session import TorchSession, best_device

        return TorchSession(files.stock, best_device(), files.guidance)


class CompileBackend(TorchBackend):
    """PyTorch, every block compiled by torch.compile (its regional compilation)."""

    name: ClassVar[str] = "compile"
    label: ClassVar[str] = "torch.compile"

    @override
    def require(self) -> None:
        from flcompress.runtime.torch_session import best_device, require_compiler

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
