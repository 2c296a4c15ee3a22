"""Write the ONNX export of a program, and compare it with torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.core.records import ContractPart, OnnxManifest
from flcompress.exporters.onnx_graph.emulation import emulate_bf16
from flcompress.exporters.onnx_graph.write import Axes, write_onnx
from flcompress.exporters.shared import TOLERANCES, Attention, ExportPrecision, preflight
from flcompress.exporters.shared.parity import Parity, cases, comparable_size, compare, outputs, reference
from flcompress.files import sha256
from flcompress.models.configs import check_transformer_config
from flcompress.progress import ProgressSink
from flcompress.runtime.backends.onnx_backend import OnnxBackend
from flcompress.runtime.inputs import OUTPUT, Arguments, Inputs, arguments_of, constants_of, tensors_of
from flcompress.runtime.manifest import MANIFEST_FILE, PARTNER_FOLDER, partner_of
from flcompress.runtime.sizes import Size, size_of, sizes_of, step_of

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class OnnxExport:
    """An export to ONNX.

    Attributes:
        precision: precision of weights and arithmetic.
        tolerance: largest accepted difference from torch at the same precision; None is that of the precision.
        producer: packages that write it, with their versions.
        attention: its form in the graph.
    """

    precision: ExportPrecision
    tolerance: float | None
    producer: str
    attention: Attention = "plain"

    def write(self, program: Program, folder: Path, final: Path, progress: ProgressSink) -> dict[str, Any]:
        """Write and check the model, or both models of two experts, and return a summary.

        Args:
            program: what is exported.
            folder: empty folder to write to.
            final: the folder's name once the export has succeeded, for messages.
            progress: called after each of three parts.
        """
        self.require_room(program, folder)
        summary = self._export(program, folder, final / MODEL_FILE, progress)
        if (other := partner_of(program)) is not None:
            (folder / PARTNER_FOLDER).mkdir()
            path = final / PARTNER_FOLDER / MODEL_FILE
            summary["partner"] = self._export(other, folder / PARTNER_FOLDER, path, progress)
        return summary

    def _export(self, program: Program, folder: Path, path: Path, progress: ProgressSink) -> dict[str, Any]:
        transformer, make = program.components["transformer"], arguments_of(program)
        model = folder / MODEL_FILE
        size, step = size_of(program, batch=2), step_of(program)
        axes = write_onnx(transformer, make, size, step, self.precision, model, self.attention)
        progress(1, 3, {})
        sizes = checked_sizes(program, axes)
        checked = self._compare(program, make, sizes, model)
        parity = checked["same"].require(str(path), "raise onnx.tolerance only if that is small enough for you")
        progress(2, 3, {})
        files = sorted(path for path in folder.iterdir() if path.is_file())
        manifest = OnnxManifest(
            file=MODEL_FILE,
            sha256={path.name: sha256(path) for path in files},
            opset=axes.opset,
            producer=self.producer,
            precision=self.precision,
            inputs=describe_inputs(make, size_of(program), axes),
            outputs=[{"name": OUTPUT, "shape": axes.output, "dtype": "float32"}],
            dynamic=list(axes.names),
            parameters=program.graph.parameters,
            tolerance=parity.tolerance,
            difference=parity.difference,
            magnitude=parity.magnitude,
            difference_to_fp32=checked["export_to_fp32"].difference,
            torch_difference_to_fp32=checked["torch_to_fp32"].difference,
            cases=parity.cases,
            checked={
                "sizes": [[size.batch, size.frames, size.height, size.width] for size in sizes],
                "arithmetic": _ARITHMETIC[self.precision],
            },
            contract=ContractPart(**program.contract.to_dict()),
            kept=dict(program.kept),
        )
        manifest.write(folder / MANIFEST_FILE)
        progress(3, 3, {"difference": parity.difference})
        shown = ("sha256", "precision", "difference", "difference_to_fp32", "tolerance", "cases", "dynamic")
        return {"bytes": sum(path.stat().st_size for path in files)} | {key: getattr(manifest, key) for key in shown}

    def require_room(self, program: Program, folder: Path) -> None:
        """Raise RequestError where the size, the disk or the memory forbids this export; before any long work."""
        transformer, text = program.components["transformer"], program.contract.max_sequence_length
        config, size = check_transformer_config(transformer), size_of(program)
        program.family.check_export(config, text)
        tokens = preflight.attention_tokens(config, size, text)
        preflight.check_keys(self.precision, tokens, preflight.describe_size(size))
        weights = [preflight.weight_bytes(component, self.precision) for component in program.transformers.values()]
        preflight.check_room("onnx", folder, sum(weights), preflight.peak_memory(max(weights), preflight.ONNX_MEMORY))

    def _compare(self, program: Program, make: Arguments, sizes: list[Size], model: Path) -> dict[str, Parity]:
        """Compare the export with torch at its own precision, and both with torch in fp32."""
        inputs = cases(make, program.contract.timesteps, sizes)
        constants = constants_of(make(sizes[0], [0.0] * sizes[0].batch, 0))
        transformer = program.components["transformer"]

        exported = self._outputs(model, inputs)  # first: while this process still holds little
        same = reference(transformer, constants, self.precision, inputs)
        exact = same if self.precision == "fp32" else reference(transformer, constants, "fp32", inputs)
        tolerance = self.tolerance or TOLERANCES[self.precision]
        return {
            "same": compare(same, exported, tolerance),
            "export_to_fp32": compare(exact, exported, tolerance),
            "torch_to_fp32": compare(exact, same, tolerance),
        }

    def _outputs(self, model: Path, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
        if self.precision != "bf16":
            return self._run(model, inputs)
        emulated = model.with_name("emulated.onnx")
        try:
            emulate_bf16(model, emulated)
            return self._run(emulated, inputs)
        finally:
            emulated.unlink(missing_ok=True)

    def _run(self, model: Path, inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
        session = OnnxBackend(provider="cpu").session(model.parent, {"file": model.name}, lean=True)
        return outputs(session, inputs)


_ARITHMETIC: dict[ExportPrecision, str] = {
    "fp32": "fp32 by ONNX Runtime on a CPU",
    "fp16": "fp16 by ONNX Runtime on a CPU, which computes each operation in fp32 and rounds its result",
    "bf16": "the same graph with every result rounded to bf16 by a cast: ONNX Runtime has no bf16 kernels on a CPU",
}


def checked_sizes(program: Program, axes: Axes) -> list[Size]:
    """Return the sizes to compare at: the program's own if a CPU can, else a small clip; and three samples.

    The three are of another size if sizes vary. The graph was traced with two samples.
    """
    # Learned positions have one size, whatever the graph leaves open.
    varies = set() if sizes_of(program).fixed else set(axes.names) - {"batch"}
    size, step = comparable_size(program) if varies else size_of(program), step_of(program)
    if not varies:
        return [size, replace(size, batch=3)]
    other = replace(
        size,
        batch=3,
        frames=size.frames + (step.frames if varies & {"frames", "tokens"} else 0),
        height=size.height + step.height,
        width=size.width + 2 * step.width,
    )
    return [size, other]


def describe_inputs(make: Arguments, size: Size, axes: Axes) -> list[dict[str, object]]:
    """Return the inputs of the graph, in the form of a manifest."""
    tensors: Inputs = tensors_of(make(size, [0.0] * size.batch, 0))
    return [
        {"name": name, "shape": shape, "dtype": str(tensors[name].dtype).removeprefix("torch.")}
        for name, shape in axes.inputs.items()
    ]
