"""Write the TensorRT export of a program, and compare it with torch on a GPU that can run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.program import Program
from flcompress.core.records import EngineManifest, OnnxManifest
from flcompress.errors import PostconditionError, RequestError
from flcompress.exporters.onnx_graph.attention import ATTENTION_OPSET
from flcompress.exporters.shared import TOLERANCES, ExportPrecision, preflight
from flcompress.exporters.tensorrt_build.build import build_engine
from flcompress.exporters.tensorrt_build.gpu_check import GPU_TOLERANCE, checked_on_gpu, sampling_of
from flcompress.exporters.tensorrt_build.profiles import Profile, Target, require_precision
from flcompress.exporters.tensorrt_build.refit import graph_digest, refit_engine
from flcompress.exporters.tensorrt_build.sizes import checked_sizes, shapes_at, sizes_in
from flcompress.files import sha256
from flcompress.models.configs import check_transformer_config
from flcompress.progress import ProgressSink
from flcompress.runtime.backends.tensorrt_backend import TensorRTBackend
from flcompress.runtime.inputs import arguments_of
from flcompress.runtime.manifest import (
    MANIFEST_FILE,
    PARTNER_FOLDER,
    partner_of,
    read_manifest,
    require_hash,
)
from flcompress.runtime.sizes import Size
from flcompress.runtime.tensorrt_api import CURRENT, card_here, load_tensorrt
from flcompress.runtime.tensorrt_session import DEVICE, runs_here

ENGINE_FILE = "model.engine"
SAME_RECIPE = "'onnx' under exports: of the same recipe"


@dataclass(frozen=True, kw_only=True)
class TensorRTExport:
    """An export to TensorRT.

    Attributes:
        precision: precision that is expected of the ONNX export; None takes any.
        targets: GPU generations that the engine is for, or "current" alone.
        profiles: ranges of sizes that it takes.
        module: the module that builds it.
        stream_weights: whether it may leave weights in host memory when it runs.
        refit: whether its weights can be replaced, and those of the engine before it are.
    """

    precision: ExportPrecision | None
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    module: str
    stream_weights: bool
    refit: bool

    def write(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Build the engine, or both engines of two experts, and its manifest, and run it if there is a GPU.

        Args:
            program: what is exported.
            folder: empty folder to write to.
            exports: folder of all exports, with the ONNX one, and the TensorRT one of before.
            progress: called after each of two parts.

        Returns:
            A summary for the terminal and the report.
        """
        onnx, before = exports / "onnx", exports / "tensorrt"
        summary = self._export(program, folder, onnx, before, progress)
        if (other := partner_of(program)) is not None:
            part = PARTNER_FOLDER
            (folder / part).mkdir()
            summary["partner"] = self._export(other, folder / part, onnx / part, before / part, progress)
        return summary

    def _export(
        self, program: Program, folder: Path, onnx: Path, before: Path, progress: ProgressSink
    ) -> dict[str, Any]:
        source, onnx_manifest = self._source(program, onnx)
        precision: ExportPrecision = onnx_manifest.precision
        sizes = [sizes_in(profile, program, onnx_manifest.dynamic, "tensorrt") for profile in self.profiles]
        self._require_room(program, folder, precision, sizes)
        make = arguments_of(program)
        shapes = [shapes_at(make, three) for three in sizes]
        trt = load_tensorrt(self.module)
        engine = folder / ENGINE_FILE
        built_for: dict[str, Any] = {
            "builder": {"name": trt.__name__, "version": trt.__version__},
            "targets": list(self.targets),
            "precision": precision,
            "shapes": [dict(zip(("min", "opt", "max"), three, strict=True)) for three in shapes],
        }
        card = card_here()
        if card is not None and self.targets == (CURRENT,):
            built_for["card"] = {"name": card.name, "target": card.target}
        if self.stream_weights:
            built_for["stream_weights"] = True
        if self.refit:
            built_for["graph"] = graph_digest(source)
        old = self._refittable(before, built_for)
        progress(0, 2, {})
        if old is None:
            built = build_engine(
                trt,
                source,
                targets=self.targets,
                profiles=shapes,
                stream_weights=self.stream_weights,
                refit=self.refit,
            )
        else:
            built = refit_engine(trt, before / ENGINE_FILE, source)
            built_for["refitted"] = old.sha256
        with engine.open("wb") as file:
            file.write(built)
        if not built.nbytes or engine.stat().st_size != built.nbytes:
            raise PostconditionError(
                f"{engine}: {engine.stat().st_size} bytes on disk, {built.nbytes} built, expected > 0"
            )
        del built
        progress(1, 2, {})
        manifest = EngineManifest(
            file=ENGINE_FILE,
            sha256=sha256(engine),
            bytes=engine.stat().st_size,
            profiles=[profile.model_dump(mode="json") for profile in self.profiles],
            inputs=onnx_manifest.inputs,
            outputs=onnx_manifest.outputs,
            **sampling_of(program),
            source={"file": os.path.relpath(source, folder), "sha256": sha256(source)},
            checked_on_gpu=False,
            difference=None,
            tolerance=GPU_TOLERANCE * TOLERANCES[precision],
            **built_for,
        )
        if runs_here(self.targets):
            manifest = self._checked(program, engine, manifest, sizes)
        manifest.write(folder / MANIFEST_FILE)
        progress(2, 2, {})
        shown = ("bytes", "sha256", "builder", "targets", "precision", "checked_on_gpu", "difference")
        refitted = {"refitted": old is not None} if self.refit else {}
        return {key: getattr(manifest, key) for key in shown} | refitted

    def _refittable(self, before: Path, built_for: dict[str, Any]) -> EngineManifest | None:
        """Return the manifest of the last export if its engine takes these weights: the same graph, built alike."""
        if not self.refit or not (before / MANIFEST_FILE).is_file() or not runs_here(self.targets):
            return None
        old = read_manifest(EngineManifest, before / MANIFEST_FILE, SAME_RECIPE)
        alike = all(getattr(old, key) == value for key, value in built_for.items())
        if not alike or old.stream_weights != self.stream_weights:
            return None
        engine = before / ENGINE_FILE
        return old if engine.is_file() and sha256(engine) == old.sha256 else None

    def _source(self, program: Program, folder: Path) -> tuple[Path, OnnxManifest]:
        """Return the ONNX model in a folder, complete and of this very program, and its manifest."""
        manifest = read_manifest(OnnxManifest, folder / MANIFEST_FILE, SAME_RECIPE)
        require_plain_attention(manifest.opset, folder / MANIFEST_FILE)
        for name, expected in manifest.sha256.items():
            require_hash(folder / name, expected, SAME_RECIPE)
        if type(program.contract).from_dict(manifest.contract.dump()) != program.contract:
            raise PostconditionError(
                f"{folder / MANIFEST_FILE}: its sampling contract is not this program's; remove the folder, "
                "then export again"
            )
        return folder / manifest.file, manifest

    def _require_room(
        self, program: Program, folder: Path, precision: ExportPrecision, sizes: list[list[Size]]
    ) -> None:
        """Raise RequestError where precision, sizes, disk or memory forbid this engine."""
        if self.precision not in (None, precision):
            raise RequestError(
                f"tensorrt.precision: {self.precision} given, but the ONNX export it is built from is {precision}; "
                f"set onnx.precision: {self.precision} too"
            )
        transformer, text = program.components["transformer"], program.contract.max_sequence_length
        require_precision(precision, self.targets, card_here())
        config = check_transformer_config(transformer)
        for *_, largest in sizes:
            tokens, what = preflight.attention_tokens(config, largest, text), preflight.describe_size(largest)
            preflight.check_keys(precision, tokens, what)
            preflight.check_scores(precision, preflight.heads_of(config), largest.batch, tokens, what)
        weights = preflight.weight_bytes(transformer, precision)
        preflight.check_room("tensorrt", folder, weights, preflight.peak_memory(weights, preflight.TENSORRT_MEMORY))

    def _checked(
        self, program: Program, engine: Path, manifest: EngineManifest, sizes: list[list[Size]]
    ) -> EngineManifest:
        """Return the manifest with the outcome of a comparison with torch on the GPU of this machine."""
        session, chosen = TensorRTBackend().session(engine.parent, manifest.dump()), checked_sizes(program, sizes)
        checked = checked_on_gpu(engine, session, program, chosen, manifest.precision, manifest.tolerance, DEVICE)
        return manifest.model_copy(update=checked)


def require_plain_attention(opset: int, path: Path) -> None:
    """Raise RequestError for an ONNX export of an opset that has attention as one operator."""
    if opset >= ATTENTION_OPSET:
        raise RequestError(
            f"{path}: onnx.attention: fused given, but TensorRT builds that operator for some head sizes only; set "
            "onnx.attention: plain"
        )
