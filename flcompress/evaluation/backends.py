"""The teacher and the student of a run behind each backend, as `flcompress bench` times them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from flcompress.core.program import Program
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config
from flcompress.runtime import BenchBackend, ExportBackend
from flcompress.runtime.manifest import PARTNER_FOLDER
from flcompress.runtime.onnx_session import require_onnxruntime
from flcompress.runtime.sessions import Export, TorchSession
from flcompress.runtime.tensorrt_session import require_gpu

LABELS: dict[BenchBackend, str] = {
    "torch": "torch eager",
    "compile": "torch.compile",
    "onnx": "ONNX Runtime (teacher: torch eager)",
    "tensorrt": "TensorRT (teacher: torch eager)",
}
"""What results and reports call a backend. A teacher is not exported: its eager time is what an export is compared
with."""

Side = Literal["teacher", "student"]
Role = Literal["transformer", "partner"]

COMPONENTS: dict[Side, dict[Role, str]] = {
    "teacher": {"transformer": "original", "partner": "original_partner"},
    "student": {"transformer": "transformer", "partner": "partner"},
}
"""Components of the program: the transformer that is compressed, and of two experts the other, its partner."""


class Sampler:
    """A model behind a backend, for timing.

    Attributes:
        network: what a sampler calls; of two experts both as one.
        contract: how it is sampled.
        precision: what it computes in.
        weight_bytes: bytes that it keeps in memory from one clip to the next, its weights above all.
        calls: evaluations of each transformer in the last clip, counted as they happen.
    """

    def __init__(
        self, contract: SamplingContract, networks: Mapping[Role, Network], precision: str, weight_bytes: int
    ) -> None:
        self.contract, self.precision, self.weight_bytes = contract, precision, weight_bytes
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

    def __init__(self, run: RunDirectory, program: Program, device: str) -> None:
        self._run, self._program, self._device = run, program, device
        self._contracts: dict[Side, SamplingContract] = {
            "teacher": program.teacher_contract,
            "student": program.contract,
        }
        self._load: Callable[[Path, float | None], TorchSession] = cache(
            lambda folder, guidance: TorchSession(folder, device, guidance)
        )
        self._compile: Callable[[TorchSession], TorchSession] = cache(TorchSession.compiled)
        self._eager: dict[Side, Sampler] = {side: self._torch(side, compiled=False) for side in COMPONENTS}

    def of(self, backend: BenchBackend) -> dict[Side, Sampler]:
        """Return both sides; a side that a backend lacks is torch's.

        Raises:
            RequestError: this run has no such export.
            UnavailableError: the backend cannot run on this machine.
        """
        if backend == "torch":
            return self._eager
        if backend == "compile":
            return {side: self._torch(side, compiled=True) for side in COMPONENTS}
        return {**self._eager, "student": self._export_sampler(backend)}

    def sessions(self, side: Side) -> dict[Role, TorchSession]:
        """Return torch's sessions of one side."""
        guidance = self._contracts[side].embedded_guidance
        return {role: self._load(self._folder(side, role), guidance) for role in self._roles(side)}

    def _roles(self, side: Side) -> tuple[Role, ...]:
        return ("transformer", "partner") if self._contracts[side].experts else ("transformer",)

    def _folder(self, side: Side, role: Role) -> Path:
        return self._program.components[COMPONENTS[side][role]]

    def _torch(self, side: Side, *, compiled: bool) -> Sampler:
        sessions = self.sessions(side)
        if compiled:
            sessions = {role: self._compile(session) for role, session in sessions.items()}
        size = sum(session.nbytes for session in set(sessions.values()))
        return Sampler(self._contracts[side], sessions, next(iter(sessions.values())).precision, size)

    def _export_sampler(self, backend: ExportBackend) -> Sampler:
        exports = {role: self._export(backend, role) for role in self._roles("student")}
        if backend == "onnx":
            require_onnxruntime("backend onnx")
        else:
            require_gpu()
        contract = self._program.contract
        networks: dict[Role, Network] = {}
        for role, export in exports.items():
            export.verify()
            config = check_transformer_config(self._folder("student", role))
            networks[role] = export.network(config, contract.embedded_guidance)
        size = sum(path.stat().st_size for export in exports.values() for path in export.files)
        return Sampler(contract, networks, exports["transformer"].precision, size)

    def _export(self, backend: ExportBackend, role: Role) -> Export:
        make_it = f"flcompress export {self._run.path} --format {backend}"
        folder = self._run.exports / backend
        export = Export.open(folder / PARTNER_FOLDER if role == "partner" else folder, backend, make_it)
        other = SamplingContract.from_dict(export.manifest.contract.dump()) != self._program.contract
        if other or (role == "transformer" and export.manifest.kept != dict(self._program.kept)):
            raise RequestError(f"{export.folder}: an export of an earlier student; make it again with: {make_it}")
        return export
