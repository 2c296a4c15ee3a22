"""Sessions of torch, torch.compile, ONNX Runtime and TensorRT, with the interface of the network that a sampler calls.

`flcompress generate` and `flcompress bench` run these, and the exporters' parity check runs the two of the exports.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flcompress.core.records import EngineManifest, OnnxManifest
from flcompress.diffusion.network import Conditioning, Network, to_device
from flcompress.errors import UnavailableError
from flcompress.models.families import family_of
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, compile_blocks, half_precision, missing_compiler
from flcompress.runtime import ExportBackend
from flcompress.runtime.inputs import Session, tensors_of
from flcompress.runtime.manifest import MANIFEST_FILE, read_manifest, require_hash
from flcompress.runtime.onnx_session import PROVIDERS, OnnxSession
from flcompress.runtime.tensorrt_api import cuda_driver
from flcompress.runtime.tensorrt_session import TensorRTSession
from flcompress.tracing.counting import listed_blocks


def best_device() -> str:
    """Return the device that torch computes on: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class TorchSession:
    """A stock transformer run by torch, eagerly or through torch.compile; a `Network`.

    On a GPU it computes in bf16, as stock pipelines are run there, on a CPU in fp32.

    Attributes:
        transformer: the stock transformer.
        precision: "bf16" or "fp32".
    """

    def __init__(self, folder: Path, device: str, guidance: float | None = None) -> None:
        """Load the transformer.

        Args:
            folder: the transformer's.
            device: what runs it.
            guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
        """
        self._device, self._half = device, device == "cuda"
        self.precision = "bf16" if self._half else "fp32"
        self._guidance = guidance
        self._set(load_transformer(folder, device, torch.bfloat16 if self._half else None))

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict; the answer is on the device of `x` [n, channels, frames, height, width], in its dtype."""
        device = self._device
        with half_precision(device, enabled=self._half):
            return self._network(x.to(device), timestep.to(device), to_device(conditioning, device)).to(x)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and buffers."""
        tensors = (*self.transformer.parameters(), *self.transformer.buffers())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def compiled(self) -> TorchSession:
        """Return a session of the same weights, in memory once, whose blocks are compiled.

        Raises:
            UnavailableError: the device is a CPU and torch.compile lacks a C++ compiler or Python's headers.
        """
        if self._device == "cpu" and (missing := missing_compiler()):
            raise UnavailableError(f"backend compile: {missing}")
        shared = (*self.transformer.parameters(), *self.transformer.buffers())
        session = copy.copy(self)
        session._set(copy.deepcopy(self.transformer, {id(tensor): tensor for tensor in shared}))
        compile_blocks(session.transformer, listed_blocks(session.transformer))
        return session

    def _set(self, transformer: Any) -> None:
        self.transformer, self._network = transformer, as_network(transformer, self._guidance)


@dataclass(frozen=True, kw_only=True)
class Export:
    """The ONNX or TensorRT export of one transformer.

    Attributes:
        backend: what runs it.
        folder: its folder.
        make_it: the command that writes it, for messages.
        manifest: the content of its manifest.
    """

    backend: ExportBackend
    folder: Path
    make_it: str
    manifest: OnnxManifest | EngineManifest

    @classmethod
    def open(cls, folder: Path, backend: ExportBackend, make_it: str) -> Export:
        """Read the manifest; RequestError where it is missing or damaged."""
        kind: type[OnnxManifest] | type[EngineManifest] = OnnxManifest if backend == "onnx" else EngineManifest
        manifest = read_manifest(kind, folder / MANIFEST_FILE, make_it)
        return cls(backend=backend, folder=folder, make_it=make_it, manifest=manifest)

    @property
    def file(self) -> Path:
        """The model or the engine."""
        return self.folder / self.manifest.file

    @property
    def files(self) -> list[Path]:
        """All files of weights."""
        return [self.folder / name for name in self._hashes()]

    @property
    def precision(self) -> str:
        """The precision of its arithmetic."""
        return self.manifest.precision

    def verify(self) -> None:
        """Raise RequestError unless its files are those that the manifest states."""
        for name, expected in self._hashes().items():
            require_hash(self.folder / name, expected, self.make_it)

    def session(self) -> Session:
        """Load it."""
        if isinstance(self.manifest, OnnxManifest):
            return onnx_session(self.file)
        return TensorRTSession(self.file, self.manifest.dump())

    def network(self, config: Mapping[str, Any], guidance: float | None) -> Network:
        """Load it as a network; see `exported_network`."""
        return exported_network(self.session(), config, guidance)

    def _hashes(self) -> dict[str, str]:
        hashes = self.manifest.sha256
        return {self.manifest.file: hashes} if isinstance(hashes, str) else hashes


def onnx_session(model: Path) -> OnnxSession:
    """Load on the GPU where both a driver and an ONNX Runtime built for it are installed, else on the CPU."""
    import onnxruntime

    gpu = cuda_driver() and PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    return OnnxSession(model, "cuda" if gpu else "cpu")


def exported_network(session: Session, config: Mapping[str, Any], guidance: float | None) -> Network:
    """Put an exported transformer behind its family's adapter: the graph's inputs are the forward's tensors.

    Args:
        session: the export.
        config: the transformer's.
        guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
    """
    family = family_of(config["_class_name"])

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        arguments = family.arguments(config, x, timestep, conditioning, guidance)
        output = session(tensors_of(family.export_arguments(config, arguments)))
        return family.prediction(config, output.to(x.device), x, timestep, conditioning)

    return call
