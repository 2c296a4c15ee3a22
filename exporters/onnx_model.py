"""Export the denoiser to ONNX: dynamic batch, fixed clip size, checked against torch through ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from flcompress.exporters.files import sha256, write_json
from flcompress.exporters.onnx_session import OnnxSession
from flcompress.exporters.parity import cases, compare, outputs
from flcompress.exporters.shapes import Shapes, shapes_of
from flcompress.exporters.wan_onnx import Denoiser, adapted
from flcompress.models.loading import load_transformer
from flcompress.pipeline.exporter import Exporter
from flcompress.pipeline.passes import ProgressSink
from flcompress.pipeline.program import Program

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
OPSET = 18
"""From 23 on attention is one operator, which TensorRT for RTX 1.7 builds for some head sizes only (not for 16); at 18
torch's exporter writes it, and the RMS norm, as plain arithmetic, which every runtime knows."""

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights above which they go to a file of their own: a protobuf file ends at 2 GiB."""

NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
"""They warn that torchvision is absent and that a Split was not folded; neither matters here."""


class OnnxExporter(Exporter):
    """`onnx: {tolerance: 1e-4}`: RUN/exports/onnx/model.onnx and its manifest.json.

    Attributes:
        tolerance: largest absolute difference of the velocity from torch's that is let through.
    """

    name: ClassVar[str] = "onnx"

    tolerance: float = Field(default=1e-4, gt=0.0, description="largest absolute difference from torch, > 0")

    def fingerprint(self) -> str:
        return " ".join(f"{package} {version(package)}" for package in ("torch", "onnx", "onnxscript"))

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Write and check the model; see `Exporter.export`."""
        shapes = shapes_of(program)
        given = cases(shapes, program.contract.timesteps)
        model = folder / MODEL_FILE
        # Each loads the weights and lets go of them: at most one copy in memory beside ONNX Runtime's.
        reference = outputs(Denoiser(load_transformer(program.components["transformer"])).on, given)
        progress(1, 3, {})
        write_onnx(adapted(load_transformer(program.components["transformer"]), shapes), shapes, model)
        progress(2, 3, {})
        found = compare(reference, outputs(OnnxSession(model), given), self.tolerance)
        found.require(
            str(exports / self.name / MODEL_FILE), "raise onnx.tolerance only if that is small enough for you"
        )
        inputs, results = shapes.bindings()
        files = sorted(path for path in folder.iterdir() if path.is_file())
        manifest = {
            "file": MODEL_FILE,
            "sha256": {path.name: sha256(path) for path in files},
            "opset": OPSET,
            "producer": self.fingerprint(),
            "inputs": inputs,
            "outputs": results,
            "parameters": program.graph.parameters,
            "tolerance": self.tolerance,
            "difference": found.difference,
            "magnitude": found.magnitude,
            "cases": found.cases,
            "contract": program.contract.to_dict(),
            "kept": dict(program.kept),
        }
        write_json(folder / MANIFEST_FILE, manifest)
        progress(3, 3, {"difference": found.difference})
        return {
            "bytes": sum(path.stat().st_size for path in files),
            "sha256": manifest["sha256"],
            "difference": found.difference,
            "tolerance": self.tolerance,
            "cases": found.cases,
        }


def write_onnx(denoiser: Denoiser, shapes: Shapes, path: Path) -> None:
    """Write the denoiser's graph with a dynamic batch; weights above `EXTERNAL_ABOVE` bytes go to `<path>.data`."""
    import onnx
    from onnxscript import optimizer

    example = cases(shapes, [500.0], batches=(2,))[0]  # two samples: torch.export takes an axis of one for a constant
    # Named once: torch warns of a second use of the name, and finds out itself that the three axes are equal.
    dynamic = {name: {0: "batch" if name == "hidden_states" else torch.export.Dim.DYNAMIC} for name in example}
    with _quiet():
        program = torch.onnx.export(
            denoiser.eval(),
            (),
            kwargs=dict(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example),
            output_names=["velocity"],
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing; with dynamo=True it is documented to return a program")
    # Of torch's optimiser only what TensorRT cannot do without: its rewrite rules took three times as long as all the
    # rest, and both runtimes fuse by themselves.
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's paths
    weights = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())
    program.save(str(path), external_data=weights > EXTERNAL_ABOVE)
    onnx.checker.check_model(str(path))  # by path: the only form that works above 2 GiB


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter is known to say about itself, and nothing else."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch copies its own deprecated LeafSpec while it exports; nothing a caller could change.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
