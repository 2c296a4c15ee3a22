"""Export a serialized TensorRT engine, built from the ONNX export; on a machine without a GPU too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from flcompress.core.program import Program
from flcompress.core.steps import Exporter
from flcompress.errors import PostconditionError, RequestError, UnavailableError
from flcompress.exporters.shared import preflight
from flcompress.exporters.shared.parity import Parity, cases, compare, outputs, reference
from flcompress.exporters.shared.weights import TOLERANCES, ExportPrecision
from flcompress.exporters.tensorrt_build.build import build_engine
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.files import sha256
from flcompress.models.configs import check_transformer_config
from flcompress.progress import ProgressSink
from flcompress.runtime.inputs import arguments_of, constants_of
from flcompress.runtime.manifest import (
    MANIFEST_FILE,
    PARTNER_FOLDER,
    partner_of,
    read_manifest,
    require_hash,
    write_json,
)
from flcompress.runtime.sizes import Size
from flcompress.runtime.tensorrt_api import builds_for_others, cuda_driver, load_tensorrt
from flcompress.runtime.tensorrt_session import TensorRTSession, runs_here

ENGINE_FILE = "model.engine"
SAME_RECIPE = "'onnx' under exports: of the same recipe"
GPU_TOLERANCE = 10.0
"""A GPU sums in another order than the CPU that made the reference: so many times the ONNX export's tolerance."""

Target = Literal["sm80", "sm86", "sm89", "sm120", "current"]
"""TensorRT has no fp32 matrix product for Turing (sm75)."""


class TensorRTExporter(Exporter):
    """`tensorrt: {targets: [sm89]}`: RUN/exports/tensorrt/model.engine and manifest.json.

    Attributes:
        precision: what the engine computes in: the ONNX export's precision.
        targets: GPU generations the engine runs on (sm89 is Ada, RTX 40), or "current" alone: the GPU of this machine.
        profiles: ranges of sizes that it takes, such as `{batch: [1, 1, 2], frames: [17, 81, 81], height: [480, 480,
            720]}`, in the units of the clip.
    """

    name: ClassVar[str] = "tensorrt"
    after: ClassVar[tuple[str, ...]] = ("onnx",)

    version: ClassVar[int] = 2

    precision: ExportPrecision | None = Field(
        default=None, description="what the engine computes in; null: as onnx.precision, which it has to equal"
    )
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = Field(
        default=("sm89",), description="GPU generations, or 'current' alone for the GPU of this machine"
    )
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)] = Field(
        default=(Profile(),),
        description="ranges of batch, frames, height and width that the engine takes, each [smallest, tuned for, "
        "largest], in frames and pixels of the clip; left out: the recipe's own size",
    )

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
        """Build the engine, write its manifest, and run it where there is a GPU; of two experts both.

        See `Exporter.export`.
        """
        self.check()
        summary = self._export(program, folder, exports / "onnx", progress)
        if (other := partner_of(program)) is not None:
            (folder / PARTNER_FOLDER).mkdir()
            summary["partner"] = self._export(
                other, folder / PARTNER_FOLDER, exports / "onnx" / PARTNER_FOLDER, progress
            )
        return summary

    def _export(self, program: Program, folder: Path, onnx: Path, progress: ProgressSink) -> dict[str, Any]:
        source, onnx_manifest = self._source(program, onnx)
        sizes = [profile.sizes(program, onnx_manifest["dynamic"]) for profile in self.profiles]
        self._require_room(program, folder, onnx_manifest["precision"], sizes)
        make = arguments_of(program)
        shapes = [profile.shapes(make, three) for profile, three in zip(self.profiles, sizes, strict=True)]
        trt = load_tensorrt()
        progress(0, 2, {})
        engine = folder / ENGINE_FILE
        built = build_engine(trt, source, targets=self.targets, profiles=shapes)
        with engine.open("wb") as file:
            file.write(built)
        if not built.nbytes or engine.stat().st_size != built.nbytes:
            raise PostconditionError(
                f"{engine}: {engine.stat().st_size} bytes on disk, {built.nbytes} built, expected > 0"
            )
        del built
        progress(1, 2, {})
        precision: ExportPrecision = onnx_manifest["precision"]
        builder = {"name": trt.__name__, "version": trt.__version__}
        ranges = [dict(zip(("min", "opt", "max"), three, strict=True)) for three in shapes]
        found = None
        if runs_here(self.targets):
            found = self._run(program, TensorRTSession(engine, builder, ranges), str(engine), precision, sizes)
        contract = program.contract
        manifest = {
            "file": ENGINE_FILE,
            "sha256": sha256(engine),
            "bytes": engine.stat().st_size,
            "builder": builder,
            "targets": list(self.targets),
            "precision": precision,
            "profiles": [profile.model_dump(mode="json") for profile in self.profiles],
            "shapes": ranges,
            "inputs": onnx_manifest["inputs"],
            "outputs": onnx_manifest["outputs"],
            "timesteps": list(contract.timesteps),
            "sigmas": list(contract.sigmas),
            "shift": contract.shift,
            "guidance_scale": contract.guidance_scale,
            "contract": contract.to_dict(),
            "kept": dict(program.kept),
            "source": {"file": os.path.relpath(source, folder), "sha256": sha256(source)},
            "checked_on_gpu": found is not None,
            "difference": None if found is None else found.difference,
            "tolerance": GPU_TOLERANCE * TOLERANCES[precision],
        }
        write_json(folder / MANIFEST_FILE, manifest)
        progress(2, 2, {})
        shown = ("bytes", "sha256", "builder", "targets", "precision", "checked_on_gpu", "difference")
        return {key: manifest[key] for key in shown}

    def _source(self, program: Program, folder: Path) -> tuple[Path, dict[str, Any]]:
        """The ONNX model in a folder, whole and of this very program, and its manifest."""
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

    def _require_room(
        self, program: Program, folder: Path, precision: ExportPrecision, sizes: list[list[Size]]
    ) -> None:
        """RequestError where precision, sizes, disk or memory forbid this engine."""
        if self.precision not in (None, precision):
            raise RequestError(
                f"tensorrt.precision: {self.precision} given, but the ONNX export it is built from is {precision}; "
                f"set onnx.precision: {self.precision} too"
            )
        transformer, text = program.components["transformer"], program.contract.max_sequence_length
        config = check_transformer_config(transformer)
        for *_, largest in sizes:
            tokens, what = preflight.attention_tokens(config, largest, text), preflight.described(largest)
            preflight.check_keys(precision, tokens, what)
            preflight.check_scores(precision, preflight.heads_of(config), largest.batch, tokens, what)
        weights = preflight.weight_bytes(transformer, precision)
        preflight.check_room("tensorrt", folder, weights, preflight.needed(weights, preflight.TENSORRT_MEMORY))

    def _run(
        self, program: Program, session: TensorRTSession, name: str, precision: ExportPrecision, sizes: list[list[Size]]
    ) -> Parity:
        """Compare with torch on the GPU of this machine, at the smallest and the tuned-for sizes."""
        make, chosen = arguments_of(program), [size for three in sizes for size in three[:2]]
        given = cases(make, program.contract.timesteps, chosen)
        constants = constants_of(make(chosen[0], [0.0] * chosen[0].batch, 0))
        expected = reference(program.components["transformer"], constants, precision, given)
        found = compare(expected, outputs(session, given), GPU_TOLERANCE * TOLERANCES[precision])
        return found.require(name, "please report it with the engine's manifest.json")
