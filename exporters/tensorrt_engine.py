"""Export a serialized TensorRT engine, built from the ONNX export; on a machine without a GPU too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from flcompress.errors import PostconditionError, UnavailableError
from flcompress.exporters.files import read_manifest, require_hash, sha256, write_json
from flcompress.exporters.onnx_model import MANIFEST_FILE
from flcompress.exporters.parity import Parity, cases, compare, outputs
from flcompress.exporters.shapes import shapes_of
from flcompress.exporters.tensorrt_api import builds_for_others, cuda_driver, load_tensorrt
from flcompress.exporters.tensorrt_build import build_engine
from flcompress.exporters.tensorrt_session import TensorRTSession, runs_here
from flcompress.exporters.wan_onnx import Denoiser
from flcompress.models.loading import load_transformer
from flcompress.pipeline.exporter import Exporter
from flcompress.pipeline.passes import ProgressSink
from flcompress.pipeline.program import Program

ENGINE_FILE = "model.engine"
SAME_RECIPE = "'onnx' under exports: of the same recipe"
GPU_TOLERANCE = 1e-3
"""Largest absolute difference from torch on a GPU; another order of sums in fp32 stays well below it."""

Target = Literal["sm80", "sm86", "sm89", "sm120", "current"]
"""TensorRT has no fp32 matrix product for Turing (sm75)."""


class TensorRTExporter(Exporter):
    """`tensorrt: {targets: [sm89], max_batch: 1}`: RUN/exports/tensorrt/model.engine and manifest.json.

    Attributes:
        precision: what the engine computes in.
        targets: GPU generations the engine runs on (sm89 is Ada, RTX 40), or "current" alone: the GPU of this machine.
        max_batch: largest batch it takes; it is tuned for one.
    """

    name: ClassVar[str] = "tensorrt"
    after: ClassVar[tuple[str, ...]] = ("onnx",)

    precision: Literal["fp32"] = Field(default="fp32", description="what the engine computes in")
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = Field(
        default=("sm89",), description="GPU generations, or 'current' alone for the GPU of this machine"
    )
    max_batch: int = Field(default=1, ge=1, description="largest batch, >= 1")

    @field_validator("targets")
    @classmethod
    def _each_once(cls, given: tuple[Target, ...]) -> tuple[Target, ...]:
        if len(set(given)) != len(given):
            raise ValueError(f"a target is given twice: {', '.join(given)}")
        if "current" in given and len(given) > 1:
            raise ValueError("'current' must stand alone; name the GPU generations instead")
        return given

    def check(self) -> None:
        """A builder is installed, and it can build for the targets on this machine."""
        trt = load_tensorrt()
        if not builds_for_others(trt) and self.targets != ("current",):
            raise UnavailableError(
                f"tensorrt.targets: {', '.join(self.targets)} given, but tensorrt {trt.__version__} builds for the GPU "
                "of this machine only; set targets: [current], or uninstall it and "
                "pip install 'flcompress[tensorrt-rtx]'"
            )
        if self.targets == ("current",) and not cuda_driver():
            raise UnavailableError(
                "tensorrt.targets: current given, but this machine has no CUDA driver; name the GPU that the engine is "
                "for, such as targets: [sm89]"
            )

    def fingerprint(self) -> str:
        trt = load_tensorrt()
        return f"{trt.__name__} {trt.__version__}"

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Build the engine, write its manifest, and run it where there is a GPU; see `Exporter.export`."""
        self.check()
        source, onnx_manifest = self._source(program, exports)
        trt = load_tensorrt()
        progress(0, 2, {})
        engine = folder / ENGINE_FILE
        built = build_engine(trt, source, targets=self.targets, max_batch=self.max_batch)
        engine.write_bytes(built)
        if not built or engine.stat().st_size != len(built):
            raise PostconditionError(
                f"{engine}: {engine.stat().st_size} bytes on disk, {len(built)} built, expected > 0"
            )
        progress(1, 2, {})
        found = self._run(program, engine) if runs_here(self.targets) else None
        contract = program.contract
        manifest = {
            "file": ENGINE_FILE,
            "sha256": sha256(engine),
            "bytes": len(built),
            "builder": {"name": trt.__name__, "version": trt.__version__},
            "targets": list(self.targets),
            "precision": self.precision,
            "batch": {"min": 1, "opt": 1, "max": self.max_batch},
            "inputs": onnx_manifest["inputs"],
            "outputs": onnx_manifest["outputs"],
            "timesteps": list(contract.timesteps),
            "sigmas": list(contract.sigmas),
            "shift": contract.shift,
            "guidance_scale": contract.guidance_scale,
            "contract": contract.to_dict(),
            "kept": dict(program.kept),
            "source": {"file": f"../onnx/{source.name}", "sha256": sha256(source)},
            "checked_on_gpu": found is not None,
            "difference": None if found is None else found.difference,
            "tolerance": GPU_TOLERANCE,
        }
        write_json(folder / MANIFEST_FILE, manifest)
        progress(2, 2, {})
        shown = ("bytes", "sha256", "builder", "targets", "precision", "checked_on_gpu", "difference")
        return {key: manifest[key] for key in shown}

    def _source(self, program: Program, exports: Path) -> tuple[Path, dict[str, Any]]:
        """The ONNX model, whole and of this very program, and its manifest."""
        folder = exports / "onnx"
        manifest = read_manifest(folder / MANIFEST_FILE, SAME_RECIPE)
        for name, expected in manifest["sha256"].items():
            require_hash(folder / name, expected, SAME_RECIPE)
        # Through from_dict, since JSON has lists where the contract has tuples.
        if type(program.contract).from_dict(manifest["contract"]) != program.contract:
            raise PostconditionError(
                f"{folder / MANIFEST_FILE}: its sampling contract is not this program's; remove the folder, "
                "then export again"
            )
        return folder / str(manifest["file"]), manifest

    def _run(self, program: Program, engine: Path) -> Parity:
        """Compare with torch on the GPU of this machine."""
        batches = tuple(batch for batch in (1, 3) if batch <= self.max_batch)
        given = cases(shapes_of(program), program.contract.timesteps, batches)
        reference = outputs(Denoiser(load_transformer(program.components["transformer"])).on, given)
        found = compare(reference, outputs(TensorRTSession(engine), given), GPU_TOLERANCE)
        return found.require(str(engine), "please report it with the engine's manifest.json")
