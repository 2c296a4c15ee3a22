"""Back ends, which run the denoiser of a pipeline; see docs/writing-a-pass.md. They live in `flcompress/runtime`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from flcompress.core.records import ContractPart
    from flcompress.diffusion.network import Conditioning, Network

STOCK_EXPORT = "diffusers"
"""The export whose transformer is a stock one: its configuration and weights, which any model folder has too."""


class Manifest(Protocol):
    """The record of a manifest.json: what every export states of itself."""

    @property
    def file(self) -> str:
        """The graph."""

    @property
    def sha256(self) -> str | dict[str, str]:
        """SHA-256 of the graph's file, or of every file by its name."""

    @property
    def precision(self) -> str:
        """The precision of its arithmetic."""

    @property
    def contract(self) -> ContractPart:
        """How its student is sampled."""

    @property
    def kept(self) -> dict[str, str]:
        """Block -> the original's block that it was."""

    def dump(self) -> dict[str, Any]:
        """Return the JSON object."""


@dataclass(frozen=True, kw_only=True)
class TransformerFiles:
    """One transformer of a pipeline, as files.

    Attributes:
        stock: folder of the stock transformer; of what runs an export, its configuration alone is read.
        export: folder of its export for the back end: RUN/exports/<export>, or the partner's inside it.
        guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
        make_it: the command that writes the export, for messages.
    """

    stock: Path
    export: Path
    guidance: float | None
    make_it: str


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenNetwork:
    """A transformer in memory, callable as a `flcompress.diffusion.network.Network`.

    Attributes:
        network: what a sampler calls.
        precision: what it computes in: "fp32", "bf16", ...
        weight_bytes: bytes of its weights.
        device: what runs it, as the runtime itself says: "cpu", "cuda", "CUDAExecutionProvider", ...
    """

    network: Network
    precision: str
    weight_bytes: int
    device: str

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Predict; see `flcompress.diffusion.network.Network`."""
        return self.network(x, timestep, conditioning)


class Backend(BaseModel, ABC):
    """Runs the denoiser of a pipeline; its validated, frozen fields are its options on the command line.

    `flcompress generate RUN --backend onnx --provider cuda` becomes `OnnxBackend(provider="cuda")`. The module of a
    back end is imported by --help, so it imports torch and its runtime inside its methods.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    label: ClassVar[str]
    """What tables call it."""
    export: ClassVar[str]
    """The export in RUN/exports that it runs; one that runs "diffusers" runs any stock transformer."""

    @property
    def stock(self) -> bool:
        """Whether it runs stock weights, and so a bench's teacher too, not an export of its own."""
        return self.export == STOCK_EXPORT

    def require(self) -> None:
        """Raise UnavailableError, in one line, where this machine cannot run it. Called before any work."""

    def manifest(self, files: TransformerFiles) -> Manifest | None:
        """Return what the export states of itself; None for stock weights.

        Raises:
            RequestError: it is missing or damaged.
        """
        return None

    def verify(self, files: TransformerFiles) -> None:
        """Raise RequestError unless the files are those that the manifest states."""

    @abstractmethod
    def open(self, files: TransformerFiles) -> OpenNetwork:
        """Load the transformer."""

    def open_beside(self, files: TransformerFiles, eager: OpenNetwork) -> OpenNetwork:
        """Load it while torch's eager network of the same stock weights is in memory, which it may share."""
        return self.open(files)
