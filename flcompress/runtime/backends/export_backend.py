"""What all back ends have in common that run an export described by a manifest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from typing_extensions import override

from flcompress.core.backend import Backend, Manifest, OpenNetwork, TransformerFiles
from flcompress.core.records import ExportManifest, Record

if TYPE_CHECKING:
    import torch

    from flcompress.diffusion.network import Conditioning, Network
    from flcompress.runtime.inputs import DeviceSession, Session


class ExportBackend(Backend):
    """Runs an export: a graph of named tensors, and manifest.json beside it."""

    record: ClassVar[type[Record]] = ExportManifest
    """The record of its manifest, with the fields of `ExportManifest` at least."""

    @abstractmethod
    def session(self, folder: Path, manifest: Mapping[str, Any]) -> DeviceSession:
        """Load the graph. The parity check of its exporter calls this too, before there is a manifest file.

        Args:
            folder: the export's.
            manifest: what it states; at a parity check, what the session reads of it.

        Raises:
            UnavailableError: what was asked for does not run it here.
        """

    @override
    def manifest(self, files: TransformerFiles) -> Manifest:
        """Read the manifest; RequestError where it is missing or damaged."""
        from flcompress.runtime.manifest import MANIFEST_FILE, read_manifest

        return cast("Manifest", read_manifest(self.record, files.export / MANIFEST_FILE, files.make_it))

    @override
    def verify(self, files: TransformerFiles) -> None:
        """Raise RequestError unless every file has the SHA-256 that the manifest states."""
        from flcompress.runtime.manifest import require_hash

        for name, expected in _hashes(self.manifest(files)).items():
            require_hash(files.export / name, expected, files.make_it)

    @override
    def open(self, files: TransformerFiles) -> OpenNetwork:
        """Load the graph, and put it behind its family's adapter."""
        from flcompress.models.configs import check_transformer_config

        manifest = self.manifest(files)
        session = self.session(files.export, manifest.dump())
        return OpenNetwork(
            network=exported_network(session, check_transformer_config(files.stock), files.guidance),
            precision=manifest.precision,
            weight_bytes=sum((files.export / name).stat().st_size for name in _hashes(manifest)),
            device=session.device,
        )


def exported_network(session: Session, config: Mapping[str, Any], guidance: float | None) -> Network:
    """Put an exported transformer behind its family's adapter: the graph's inputs are the forward's tensors.

    Args:
        session: the export.
        config: the transformer's.
        guidance: embedded guidance scale, where the network takes one; the family's usual one where None.
    """
    from flcompress.diffusion.network import beside
    from flcompress.models.families import family_of
    from flcompress.runtime.inputs import tensors_of

    family = family_of(config["_class_name"])

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        arguments = family.arguments(config, x, timestep, beside(x, conditioning), guidance)
        output = session(tensors_of(family.export_arguments(config, arguments)))
        return family.prediction(config, output.to(x.device), x, timestep, conditioning)

    return call


def _hashes(manifest: Manifest) -> dict[str, str]:
    """File -> SHA-256."""
    hashes = manifest.sha256
    return {manifest.file: hashes} if isinstance(hashes, str) else hashes
