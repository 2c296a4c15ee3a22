"""Write a pipeline folder for stock diffusers, and check what stock diffusers makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flcompress.core.program import FACTS_FILE, Program
from flcompress.core.records import ContractPart, FactsFile, Quantization
from flcompress.diffusion.contract import SamplingContract, levels_of, scheduler_of, set_levels
from flcompress.errors import ModelError, PostconditionError
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.model_card import model_card
from flcompress.exporters.shared.parity import TIMESTEPS, Parity, cases, comparable_size, compare, outputs, reference
from flcompress.exporters.shared.quantization import flat_state, layers_of, quantize_in
from flcompress.exporters.shared.weights import DTYPES, store_in
from flcompress.models.configs import check_transformer_config
from flcompress.models.families import family_of
from flcompress.models.families.family import Family
from flcompress.models.folder import check_weights
from flcompress.models.part_check import check_quantized, is_quantized, matching_tensors
from flcompress.models.parts import part_names
from flcompress.models.shards import folder_tensors
from flcompress.models.stock import WITH_WEIGHTS, no_progress_bars
from flcompress.progress import ProgressSink
from flcompress.runtime.inputs import Denoiser, arguments_of, constants_of
from flcompress.runtime.manifest import KEPT_FILE, copy_component, partner_of, write_json
from flcompress.runtime.sizes import clip_of
from flcompress.runtime.torch_session import load_quantized


def write_pipeline(
    program: Program,
    folder: Path,
    progress: ProgressSink,
    precision: ExportPrecision | None = None,
    quantize: Quantization | None = None,
) -> dict[str, Any]:
    """Write a pipeline folder and load it back by stock diffusers.

    Args:
        program: what is exported.
        folder: empty folder to write to.
        progress: called after each component, and after the check.
        precision: what the transformers' weights are stored in; as they are where None.
        quantize: what their blocks' linear layers are quantised to, the rest being in bf16; none where None.

    Returns:
        A summary for the terminal and the report.

    Raises:
        RequestError: no layer can be quantised.
        PostconditionError: stock diffusers loads something else than was written.
    """
    programs = _by_transformer(program)
    layers = {} if quantize is None else {name: layers_of(one, quantize) for name, one in programs.items()}
    parts = program.transformers | {name: program.components[name] for name in part_names(program.index)}
    for done, (name, source) in enumerate(parts.items()):
        copy_component(source, folder / name)
        if precision is not None and name in program.transformers:
            store_in(folder / name, precision)
        if quantize is not None and name in layers:
            quantize_in(folder / name, quantize, layers[name])
        if name.startswith(WITH_WEIGHTS):
            check_weights(folder / name)
        progress(done + 1, len(parts) + 1, {})
    scheduler = scheduler_of(program.contract)
    scheduler.save_pretrained(str(folder / "scheduler"))
    index = {
        **program.index,
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / program.own_name / KEPT_FILE, dict(program.kept))
    size = clip_of(program).arguments()
    if program.family.image:
        del size["num_frames"]
    call = call_arguments(program.contract, program.family) | size
    frame_rate = frame_rate_of(program)
    facts = FactsFile(
        contract=ContractPart(**program.contract.to_dict()),
        call=call,
        parameters=program.graph.parameters,
        kept=dict(program.kept),
        latents=list(program.latents),
        frame_rate=frame_rate,
        pipeline_class=program.pipeline_class,
    )
    changed: dict[str, Any] = {}
    if precision is not None:
        rounding = _rounding(programs, folder, precision)
        changed = {"precision": precision, "difference": rounding.difference, "magnitude": rounding.magnitude}
    if quantize is not None:
        changed |= {
            "quantize": quantize,
            "quantized": {name: each.quantized for name, each in layers.items()},
            "unquantized": {name: each.others for name, each in layers.items()},
            "transformer_bytes": sum(t.size for name in layers for t in folder_tensors(folder / name).values()),
        }
    facts = facts.model_copy(update=changed)
    facts.write(folder / FACTS_FILE)
    (folder / "README.md").write_text(model_card(program, facts), encoding="utf-8")
    check_folder(folder, program.pipeline_class, program.contract)
    progress(len(parts) + 1, len(parts) + 1, {})
    return {
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "parameters": program.graph.parameters,
        "call": call,
        **{key: changed[key] for key in ("precision", "quantize", "difference", "transformer_bytes") if key in changed},
    }


def _by_transformer(program: Program) -> dict[str, Program]:
    """Return name -> the program of that transformer; two of experts."""
    programs = {program.own_name: program}
    if (other := partner_of(program)) is not None:
        programs |= {name: other for name in program.transformers if name != program.own_name}
    return programs


def _rounding(programs: Mapping[str, Program], folder: Path, precision: ExportPrecision) -> Parity:
    """Compare the written transformers, at a precision, with the stored ones in fp32; the largest of two experts."""
    parities = []
    for name, one in programs.items():
        make, size = arguments_of(one), comparable_size(one)
        constants = constants_of(make(size, [0.0], 0))
        inputs = [case for step in one.contract.timesteps[:TIMESTEPS] for case in cases(make, [step], [size])]
        exact = reference(one.components["transformer"], constants, "fp32", inputs)
        if is_quantized(folder / name):
            denoiser = Denoiser(load_quantized(folder / name), constants, DTYPES[precision]).eval()
            written = outputs(denoiser, inputs)
        else:
            written = reference(folder / name, constants, precision, inputs)
        parities.append(compare(exact, written, math.inf))
    return max(parities, key=lambda parity: parity.difference)


def call_arguments(contract: SamplingContract, family: Family) -> dict[str, int | float | str]:
    """Arguments that a stock pipeline's call needs in addition to prompt and size; its own defaults are a teacher's."""
    negative = contract.negative_prompt if contract.guided else ""
    return {
        "num_inference_steps": contract.num_inference_steps,
        **family.call(contract.guidance_scale, contract.embedded_guidance, negative),
        **_experts_call(contract),
        "max_sequence_length": contract.max_sequence_length,
    }


def frame_rate_of(program: Program) -> float:
    """Frames a second of its clips: those of the run's data where they are known, else the family's."""
    if program.frame_rate is not None:
        return program.frame_rate
    config = check_transformer_config(program.components["transformer"])
    return program.family.frame_rate(program.index, config)


def _experts_call(contract: SamplingContract) -> dict[str, float]:
    """Guidance arguments of two experts. The stock pipeline guides neither where the first scale is at most 1."""
    if contract.experts is None:
        return {}
    scales = {"guidance_scale_2": contract.experts.guidance_scale}
    only_second = contract.guidance_scale == 1.0 and contract.guided
    return scales | ({"guidance_scale": math.nextafter(1.0, 2.0)} if only_second else {})


def check_folder(folder: Path, pipeline_class: str, contract: SamplingContract) -> None:
    """Load the folder by stock diffusers and compare it with what was to be written.

    Raises:
        PostconditionError: a tensor that is missing, left over or changed, or a schedule other than the contract's.
    """
    factory = family_of(pipeline_class).model_class(pipeline_class)
    with no_progress_bars():
        quantized = is_quantized(folder / "transformer")
        kept = {"dtype": torch.bfloat16} if quantized else {}  # which quantised weights compute in
        pipeline = factory.from_pretrained(str(folder), use_safetensors=True, **kept)
    for name in ("transformer", "vae", *(("transformer_2",) if contract.experts else ())):
        _same_tensors(getattr(pipeline, name), folder / name)
    set_levels(pipeline.scheduler, contract)
    stock = dict(zip(("sigmas", "timesteps"), levels_of(pipeline.scheduler), strict=True))
    for what, expected in (("sigmas", contract.sigmas), ("timesteps", contract.timesteps)):
        if stock[what] != expected:
            raise PostconditionError(
                f"{folder / 'scheduler'}: a stock pipeline would use {what} {_few(stock[what])}, the model was "
                f"made for {_few(expected)}; "
                f"here is diffusers {version('diffusers')}, install the one that the recipe ran with"
            )


def _same_tensors(module: Any, folder: Path) -> None:
    """Raise PostconditionError unless what stock diffusers loaded is what the files hold, in its own dtype."""
    state = module.state_dict()
    try:
        if is_quantized(folder):
            check_quantized(folder, module)
            state, stored = flat_state(state), folder_tensors(folder)
        else:
            stored = matching_tensors(folder, module)
    except ModelError as error:
        raise PostconditionError(str(error)) from error
    for name, loaded in state.items():
        written = torch.empty(loaded.shape, dtype=loaded.dtype)
        stored[name].fill(written)
        if not torch.equal(loaded.float(), written.float()):
            raise PostconditionError(f"{stored[name].file}: stock diffusers reads another value for tensor {name}")


def _few(numbers: tuple[float, ...]) -> str:
    shown = ", ".join(f"{number:g}" for number in numbers[:4])
    return f"[{shown}{', ...' if len(numbers) > 4 else ''}]"
