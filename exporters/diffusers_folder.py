"""Export a pipeline folder that stock diffusers loads, with the scheduler and call arguments of the contract."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

from flcompress.diffusion.contract import SamplingContract
from flcompress.errors import ModelError, PostconditionError
from flcompress.exporters.files import copy_component, write_json
from flcompress.exporters.model_card import model_card
from flcompress.exporters.shapes import clip_of, shapes_of
from flcompress.models.folder import check_weights, read_json
from flcompress.models.quiet import no_progress_bars
from flcompress.pipeline.exporter import Exporter
from flcompress.pipeline.passes import ProgressSink
from flcompress.pipeline.program import Program

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
KEPT_FILE = "kept_blocks.json"
FACTS_FILE = "flcompress.json"


class DiffusersExporter(Exporter):
    """`diffusers: {}`: RUN/exports/diffusers, for `WanPipeline.from_pretrained`; safetensors only, dtype as stored."""

    name: ClassVar[str] = "diffusers"

    def fingerprint(self) -> str:
        return f"diffusers {version('diffusers')}"

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        """Write the folder and load it back by stock diffusers; see `Exporter.export`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        index = _source_index(program)
        for done, name in enumerate(COMPONENTS):
            copy_component(program.components[name], folder / name)
            progress(done + 1, len(COMPONENTS) + 1, {})
        for name in ("transformer", "vae", "text_encoder"):
            check_weights(folder / name)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(program.contract.scheduler))
        scheduler.save_pretrained(str(folder / "scheduler"))
        index |= {
            "_class_name": program.pipeline_class,
            "_diffusers_version": version("diffusers"),
            "scheduler": ["diffusers", type(scheduler).__name__],
        }
        write_json(folder / "model_index.json", index)
        write_json(folder / "transformer" / KEPT_FILE, dict(program.kept))
        shapes = shapes_of(program)
        call = call_arguments(program.contract) | clip_of(program, shapes).arguments()
        facts = {
            "contract": program.contract.to_dict(),
            "call": call,
            "parameters": program.graph.parameters,
            "kept": dict(program.kept),
            "latents": list(shapes.latents),
            "pipeline_class": program.pipeline_class,
        }
        write_json(folder / FACTS_FILE, facts)
        (folder / "README.md").write_text(model_card(program, call), encoding="utf-8")
        check_folder(folder, program.contract)
        progress(len(COMPONENTS) + 1, len(COMPONENTS) + 1, {})
        return {
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            "parameters": program.graph.parameters,
            "call": call,
        }


def call_arguments(contract: SamplingContract) -> dict[str, int | float]:
    """Arguments that a stock pipeline's call needs beside prompt and size; its own defaults are a teacher's."""
    return {
        "num_inference_steps": contract.num_inference_steps,
        "guidance_scale": contract.guidance_scale,
        "max_sequence_length": contract.max_sequence_length,
    }


def check_folder(folder: Path, contract: SamplingContract) -> None:
    """Load the folder by stock diffusers and compare it with what was to be written.

    Raises:
        PostconditionError: a tensor that is missing, left over or changed, or a schedule other than the contract's.
    """
    from diffusers import WanPipeline

    with no_progress_bars():
        pipeline = WanPipeline.from_pretrained(str(folder), use_safetensors=True)
    for name in ("transformer", "vae"):
        _same_tensors(getattr(pipeline, name), folder / name)
    pipeline.scheduler.set_timesteps(contract.num_inference_steps)
    found = {
        "sigmas": tuple(float(sigma) for sigma in pipeline.scheduler.sigmas[:-1]),
        "timesteps": tuple(float(timestep) for timestep in pipeline.scheduler.timesteps),
    }
    for what, expected in (("sigmas", contract.sigmas), ("timesteps", contract.timesteps)):
        if found[what] != expected:
            raise PostconditionError(
                f"{folder / 'scheduler'}: a stock pipeline would use {what} {_few(found[what])}, the model was "
                f"made for {_few(expected)}; "
                f"here is diffusers {version('diffusers')}, install the one that the recipe ran with"
            )


def _same_tensors(module: torch.nn.Module, folder: Path) -> None:
    from safetensors import safe_open

    left = dict(module.state_dict())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key not in left:
                    raise PostconditionError(
                        f"{path}: stock diffusers has no place for tensor {key}; check config.json"
                    )
                if not torch.equal(left.pop(key), file.get_tensor(key)):
                    raise PostconditionError(f"{path}: stock diffusers reads another value for tensor {key}")
    if left:
        raise PostconditionError(f"{folder}: {len(left)} tensors missing, first {min(left)}; check config.json")


def _source_index(program: Program) -> dict[str, Any]:
    """`model_index.json` of the model folder: which classes its parts are of. No pass touches the tokenizer."""
    path = program.components["tokenizer"].parent / "model_index.json"
    index = read_json(path, "the tokenizer of a diffusers pipeline lies beside one")
    if index.get("_class_name") != program.pipeline_class:
        raise ModelError(f"{path}: _class_name is {index.get('_class_name')!r}, expected {program.pipeline_class}")
    return index


def _few(numbers: tuple[float, ...]) -> str:
    shown = ", ".join(f"{number:g}" for number in numbers[:4])
    return f"[{shown}{', ...' if len(numbers) > 4 else ''}]"
