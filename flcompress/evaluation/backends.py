"""The teacher and the student of a run behind each backend, as `flcompress bench` times and `eval` samples them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from flcompress.core.backend import Backend, OpenNetwork, TransformerFiles
from flcompress.core.program import Program
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.files import key_of
from flcompress.models.stock_files import folder_digest
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.runtime.manifest import PARTNER_FOLDER

Side = Literal["teacher", "student"]
Role = Literal["transformer", "partner"]

COMPONENTS: dict[Side, dict[Role, str]] = {
    "teacher": {"transformer": "original", "partner": "original_partner"},
    "student": {"transformer": "transformer", "partner": "partner"},
}
"""Components of the program: the transformer that is compressed, and of two experts the other, its partner."""


class Sampler:
    """A model behind a backend.

    Attributes:
        network: what a sampler calls; of two experts both as one.
        networks: the transformers in memory.
        contract: how it is sampled.
        precision: what it computes in.
        weight_bytes: bytes that it keeps in memory from one clip to the next, its weights above all.
        calls: evaluations of each transformer in the last clip, counted as they happen.
    """

    def __init__(self, contract: SamplingContract, networks: Mapping[Role, OpenNetwork]) -> None:
        self.contract, self.networks = contract, networks
        self.precision = networks["transformer"].precision
        self.weight_bytes = sum(network.weight_bytes for network in networks.values())
        self.calls: dict[Role, int] = dict.fromkeys(networks, 0)
        counted = {role: self._count_calls(role, network) for role, network in networks.items()}
        experts = contract.experts
        own = counted["transformer"]
        self.network = own if experts is None else experts.combine(own, counted["partner"])

    def _count_calls(self, role: Role, network: Network) -> Network:
        def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            self.calls[role] += 1
            return network(x, timestep, conditioning)

        return call


class Samplers:
    """The teacher and the student of a run, by backend; the weights of a transformer are in memory once for torch."""

    def __init__(self, run: RunDirectory, program: Program, eager: Backend) -> None:
        """Nothing is loaded yet.

        Args:
            run: a finished run.
            program: its last.
            eager: torch's backend.
        """
        self._run, self._program, self._backend = run, program, eager
        self._contracts: dict[Side, SamplingContract] = {
            "teacher": program.teacher_contract,
            "student": program.contract,
        }
        self._loaded: dict[tuple[Backend, TransformerFiles], OpenNetwork] = {}
        self._checked: set[Backend] = set()
        self._eager: dict[Side, Sampler] = {}

    def check(self, backend: Backend) -> None:
        """Check, before anything is loaded, that a backend can run what it runs of this run.

        Raises:
            RequestError: this run has no such export, or one that is damaged or of an earlier student.
            UnavailableError: the backend cannot run on this machine.
        """
        backend.require()
        for role in self._roles("student"):
            files = self._files(backend, "student", role)
            if (manifest := backend.manifest(files)) is not None:
                other = SamplingContract.from_dict(manifest.contract.dump()) != self._program.contract
                if other or (role == "transformer" and manifest.kept != dict(self._program.kept)):
                    raise RequestError(
                        f"{files.export}: an export of an earlier student; make it again with: {files.make_it}"
                    )
            backend.verify(files)
        self._checked.add(backend)

    def of(self, backend: Backend) -> dict[Side, Sampler]:
        """Return both sides, loaded; a side that a backend lacks is torch's. Raises as `check` does."""
        if not self._eager:
            self._eager = {side: self._sampler(self._backend, side) for side in COMPONENTS}
        if backend == self._backend:
            return self._eager
        if backend not in self._checked:
            self.check(backend)
        sides: tuple[Side, ...] = tuple(COMPONENTS) if backend.stock else ("student",)
        return self._eager | {side: self._sampler(backend, side) for side in sides}

    def student(self, backend: Backend) -> Sampler:
        """Return the student alone, loaded. Raises as `check` does."""
        if backend not in self._checked:
            self.check(backend)
        return self._sampler(backend, "student")

    def identity(self, backend: Backend) -> str:
        """Return a digest of what decides the student's clips behind a backend: its files and its options."""
        files = [self._files(backend, "student", role) for role in self._roles("student")]
        manifests = [backend.manifest(each) for each in files]
        return key_of(
            backend=backend.name,
            options=backend.model_dump(mode="json"),
            files=[
                folder_digest(each.stock) if manifest is None else manifest.sha256
                for each, manifest in zip(files, manifests, strict=True)
            ],
        )

    def release(self) -> None:
        """Free the memory of what was loaded."""
        self._loaded.clear()
        self._eager.clear()
        free_gpu_memory()

    def folder(self, side: Side, role: Role) -> Path:
        """Return the folder of a stock transformer."""
        return self._program.components[COMPONENTS[side][role]]

    def _sampler(self, backend: Backend, side: Side) -> Sampler:
        networks = {role: self._open(backend, side, role) for role in self._roles(side)}
        return Sampler(self._contracts[side], networks)

    def _open(self, backend: Backend, side: Side, role: Role) -> OpenNetwork:
        key = backend, self._files(backend, side, role)
        if key not in self._loaded:  # both sides may have one partner
            eager = self._eager[side].networks[role] if self._eager else None
            self._loaded[key] = backend.open(key[1]) if eager is None else backend.open_beside(key[1], eager)
        return self._loaded[key]

    def _roles(self, side: Side) -> tuple[Role, ...]:
        return ("transformer", "partner") if self._contracts[side].experts else ("transformer",)

    def _files(self, backend: Backend, side: Side, role: Role) -> TransformerFiles:
        folder = self._run.exports / backend.export
        return TransformerFiles(
            stock=self.folder(side, role),
            export=folder / PARTNER_FOLDER if role == "partner" else folder,
            guidance=self._contracts[side].embedded_guidance,
            make_it=f"flcompress export {self._run.path} --format {backend.export}",
        )
