"""Write the Torch-TensorRT export of a program, and compare it with torch on a GPU that can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from flcompress.core.program import Program
from flcompress.core.records import TorchTensorRTManifest
from flcompress.exporters.onnx_graph.write import varying_axes
from flcompress.exporters.shared import TOLERANCES, ExportPrecision, preflight
from flcompress.exporters.tensorrt_build.gpu_check import GPU_TOLERANCE, checked_on_gpu, sampling_of
from flcompress.exporters.tensorrt_build.profiles import Profile, Target
from flcompress.exporters.tensorrt_build.sizes import checked_sizes, shapes_at, sizes_in
from flcompress.exporters.torch_tensorrt_build.build import build_engine, shapes_of
from flcompress.exporters.torch_tensorrt_build.lowering import is_operator, lower
from flcompress.exporters.torch_tensorrt_build.parts import Part, cut
from flcompress.files import sha256
from flcompress.models.configs import check_transformer_config
from flcompress.progress import ProgressSink
from flcompress.runtime.backends.torch_tensorrt_backend import TorchTensorRTBackend
from flcompress.runtime.inputs import OUTPUT, arguments_of, constants_of, tensors_of
from flcompress.runtime.manifest import MANIFEST_FILE, PARTNER_FOLDER, partner_of
from flcompress.runtime.sizes import Size, size_of, step_of
from flcompress.runtime.tensorrt_api import CURRENT, card_here
from flcompress.runtime.tensorrt_session import DEVICE, runs_here
from flcompress.runtime.torch_tensorrt_api import capability_of, load_torch_tensorrt, stand_in, versions

Engine = Literal["whole", "block"]
"""What one engine computes."""


@dataclass(frozen=True, kw_only=True)
class TorchTensorRTExport:
    """An export to Torch-TensorRT.

    Attributes:
        precision: precision of weights and arithmetic.
        engine: what one engine computes.
        targets: GPU generations that the engines are for, or "current" alone.
        profiles: ranges of sizes that they take.
    """

    precision: ExportPrecision
    engine: Engine
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]

    def write(self, program: Program, folder: Path, progress: ProgressSink) -> dict[str, Any]:
        """Build the engines, of both experts if there are two, and their manifest, and run them if there is a GPU.

        Args:
            program: what is exported.
            folder: empty folder to write to.
            progress: called after the lowering and after each engine.

        Returns:
            A summary for the terminal and the report.
        """
        summary = self._export(program, folder, progress)
        if (other := partner_of(program)) is not None:
            (folder / PARTNER_FOLDER).mkdir()
            summary["partner"] = self._export(other, folder / PARTNER_FOLDER, progress)
        return summary

    def _export(self, program: Program, folder: Path, progress: ProgressSink) -> dict[str, Any]:
        make, step = arguments_of(program), step_of(program)
        axes = varying_axes(make, size_of(program, batch=2), step)
        dynamic = {axis for named in axes.values() for axis in named.values()}
        sizes = [sizes_in(profile, program, dynamic, "torch-tensorrt") for profile in self.profiles]
        self._require_room(program, folder, sizes)
        capability = capability_of(self.targets)
        torch_tensorrt = load_torch_tensorrt(capability)
        every = [size for three in sizes for size in three]
        largest = _largest(every)
        example = make(largest, [500.0] * largest.batch, 0)
        points = [[tensors_of(make(size, [0.0] * size.batch, 0)) for size in three] for three in sizes]
        varying = _varying(axes, [inputs for three in points for inputs in three])
        settings = torch_tensorrt.dynamo.CompilationSettings(
            device=torch_tensorrt.Device(gpu_id=0),
            disable_tf32=True,  # fp32 is to mean fp32
            assume_dynamic_shape_support=bool(varying),
            truncate_double=True,  # TensorRT has no fp64, in which some families compute rotary tables
            attn_bias_is_causal=False,  # a mask over the prompt's padding is not
        )
        tensors = tensors_of(example)
        with stand_in(capability):
            graph = lower(
                program.components["transformer"], tensors, constants_of(example), varying, self.precision, settings
            )
            blocks = [block.path for block in program.graph.blocks]
            parts = cut(graph, blocks, each_block=self.engine == "block")
            (result,) = graph.graph.output_node().all_input_nodes
            names = _names(graph, list(tensors), parts)
            shapes = [[shapes_of(graph, inputs) for inputs in three] for three in points]
            progress(1, len(parts) + 1, {})
            engines: list[dict[str, Any]] = []
            for number, part in enumerate(parts):
                file = folder / (f"model-{number:03d}.engine" if self.engine == "block" else "model.engine")
                with file.open("wb") as target:
                    target.write(build_engine(part, names, shapes, self.targets, settings))
                engines.append(
                    {
                        "file": file.name,
                        "inputs": [names[node] for node in part.inputs],
                        "outputs": [names[node] for node in part.outputs],
                        "blocks": list(part.blocks),
                    }
                )
                progress(number + 2, len(parts) + 1, {})
        taken = {name for engine in engines for name in engine["inputs"]}
        files = [folder / engine["file"] for engine in engines]
        manifest = TorchTensorRTManifest(
            file=files[0].name,
            sha256={file.name: sha256(file) for file in files},
            bytes=sum(file.stat().st_size for file in files),
            builder=versions(torch_tensorrt),
            targets=list(self.targets),
            precision=self.precision,
            engine=self.engine,
            engines=engines,
            operators=sum(map(is_operator, graph.graph.nodes)),
            in_torch=[],  # else `lower` had refused
            profiles=[profile.model_dump(mode="json") for profile in self.profiles],
            shapes=[dict(zip(("min", "opt", "max"), shapes_at(make, three), strict=True)) for three in sizes],
            inputs=[
                {
                    "name": name,
                    "shape": _axes([inputs[name].shape for three in points for inputs in three], axes[name]),
                    "dtype": _dtype(tensor),
                }
                for name, tensor in tensors.items()
                if name in taken
            ],
            # Every stock transformer's output has the axes of its first input.
            outputs=[
                {
                    "name": OUTPUT,
                    "shape": _axes([at[result] for three in shapes for at in three], axes["hidden_states"]),
                    "dtype": "float32",
                }
            ],
            **sampling_of(program),
            checked_on_gpu=False,
            difference=None,
            tolerance=GPU_TOLERANCE * TOLERANCES[self.precision],
        )
        card = card_here()
        if card is not None and self.targets == (CURRENT,):
            manifest = manifest.model_copy(update={"card": {"name": card.name, "target": card.target}})
        del graph, parts
        if runs_here(self.targets):
            session, chosen = TorchTensorRTBackend().session(folder, manifest.dump()), checked_sizes(program, sizes)
            checked = checked_on_gpu(folder, session, program, chosen, self.precision, manifest.tolerance, DEVICE)
            manifest = manifest.model_copy(update=checked)
        manifest.write(folder / MANIFEST_FILE)
        shown = ("bytes", "builder", "targets", "precision", "operators", "in_torch", "checked_on_gpu", "difference")
        return {"engines": len(engines)} | {key: getattr(manifest, key) for key in shown}

    def _require_room(self, program: Program, folder: Path, sizes: list[list[Size]]) -> None:
        """Raise RequestError where precision, sizes, disk or memory forbid these engines; before any long work."""
        transformer, text = program.components["transformer"], program.contract.max_sequence_length
        config = check_transformer_config(transformer)
        program.family.check_export(config, text)
        for *_, largest in sizes:
            tokens, what = preflight.attention_tokens(config, largest, text), preflight.describe_size(largest)
            preflight.check_keys(self.precision, tokens, what, "torch-tensorrt.precision")
        weights = preflight.weight_bytes(transformer, self.precision)
        memory = preflight.peak_memory(weights, preflight.TORCH_TENSORRT_MEMORY[self.engine])
        preflight.check_room("torch-tensorrt", folder, weights, memory, "torch-tensorrt.precision")


def _largest(sizes: Sequence[Size]) -> Size:
    """Return the largest of every axis: torch.export takes an axis of 1 for a constant."""
    return Size(
        batch=max(size.batch for size in sizes),
        frames=max(size.frames for size in sizes),
        height=max(size.height for size in sizes),
        width=max(size.width for size in sizes),
    )


def _varying(
    axes: Mapping[str, Mapping[int, str]], points: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, dict[int, str]]:
    """Return the axes that differ between the sizes of the profiles; nothing where all are of one size."""
    varying = {
        name: {axis: what for axis, what in named.items() if len({inputs[name].shape[axis] for inputs in points}) > 1}
        for name, named in axes.items()
    }
    return varying if any(varying.values()) else {}


def _names(graph: fx.GraphModule, inputs: Sequence[str], parts: Sequence[Part]) -> dict[fx.Node, str]:
    """Return node -> name of its tensor in engines and manifest, of all that enters or leaves a part."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, inputs, strict=True))
    (output,) = graph.graph.output_node().all_input_nodes
    names[output] = OUTPUT
    for part in parts:
        for node in part.outputs:
            names.setdefault(node, f"inner.{node.name}")
    return names


def _axes(shapes: Sequence[Sequence[int]], names: Mapping[int, str]) -> list[int | str]:
    """Return the axes of a tensor from its shapes at all sizes: a length, or the name of what it varies with."""
    return [
        lengths[0] if len(set(lengths)) == 1 else names[axis] for axis, lengths in enumerate(zip(*shapes, strict=True))
    ]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
