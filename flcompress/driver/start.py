"""The program that a recipe starts from: a model folder, traced from its configuration alone.

Of a model with two experts a recipe compresses one; the other is its partner (docs/decisions/0008-two-experts.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.program import FACTS_FILE, Fact, Program
from flcompress.diffusion.contract import PipelineSigmas, SamplingContract
from flcompress.diffusion.experts import COMPONENTS, OTHER, Experts
from flcompress.diffusion.student import student_contract
from flcompress.errors import ModelError, RecipeError, RequestError
from flcompress.files import key_of
from flcompress.frontend.recipe import Recipe
from flcompress.ir.graph import BlockGraph
from flcompress.models.stock_files import folder_digest

if TYPE_CHECKING:
    from flcompress.models.families.family import Family, LatentShape

VERSION = 3
"""Raise it when the same model and recipe give another program: it is part of the cache key."""

SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that a recipe starts from, as its configurations describe it.

    Attributes:
        folder: the model folder.
        transformer: the folder of the transformer that is compressed.
        contract: how the model is sampled.
        index: its `model_index.json`, with the pipeline class that the recipe names.
        latents: (channels, frames, height, width) of the latents that are sampled.
    """

    folder: Path
    transformer: Path
    contract: SamplingContract
    index: dict[str, Any]
    latents: tuple[int, int, int, int]

    @property
    def graph(self) -> BlockGraph:
        """Block graph of the transformer, traced at `latents`."""
        return trace_folder(self.transformer, self.contract.max_sequence_length, self.latents[1:])


def check_sampling(recipe: Recipe, source: Source) -> None:
    """Check, before any work, that the recipe's model can be sampled as the recipe says.

    Raises:
        RequestError: a pass cannot follow how the model is sampled, the scheduler has no steps for a student, or
            nothing would use the negative prompt.
    """
    from flcompress.models.families import family_of

    contract, sigmas = source.contract, family_of(source.index["_class_name"]).sigmas
    for step in recipe.passes:
        step.check_model(contract)
        if Fact.FEW_STEP in step.gives:
            student_contract(contract, step.evaluations(contract.evaluations), sigmas, by=step.name)
    if contract.negative_prompt and not contract.guided and not any(step.guides for step in recipe.passes):
        raise RecipeError(
            f"{recipe.where('sampling')}.negative_prompt: given, but neither the model (guidance_scale 1) nor a pass "
            "guides by text, so it has no effect; leave it out or set sampling.guidance_scale"
        )


def model_index(recipe: Recipe) -> dict[str, Any]:
    """Return the `model_index.json` of the recipe's model."""
    from flcompress.models.configs import read_index

    return read_index(recipe.model_folder())


def read_source(recipe: Recipe) -> Source:
    """Read the configurations of the recipe's model; no weights are loaded.

    Raises:
        RequestError: its scheduler, its experts and their partner, or the size do not allow what the recipe asks for.
    """
    from flcompress.diffusion.contract import contract_of
    from flcompress.models.configs import check_transformer_config
    from flcompress.models.families import family_of

    folder, sampling, index = recipe.model_folder(), recipe.sampling, model_index(recipe)
    scheduler = _scheduler_config(folder, index)
    family = family_of(index["_class_name"])
    if recipe.model.pipeline is not None:
        index["_class_name"] = _other_pipeline(recipe, family)
    experts = read_experts(recipe, index)
    transformer = transformer_folders(recipe, folder, experts)["transformer"]
    config = check_transformer_config(transformer)
    shape = _latent_shape(recipe, family, config)
    embedded = _embedded_guidance(recipe, family, config)
    try:
        contract = contract_of(
            scheduler,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.scale,
            max_sequence_length=sampling.max_sequence_length,
            embedded_guidance=embedded,
            pipeline_sigmas=family.sigmas,
            mu=family.mu(scheduler, config, shape),
            experts=experts,
            negative_prompt=sampling.negative_prompt,
        )
    except ModelError as error:
        raise ModelError(f"{folder / SCHEDULER_FILE}: {error}") from error
    return Source(
        folder=folder,
        transformer=transformer,
        contract=with_partner(recipe, contract, family.sigmas),
        index=index,
        latents=(family.channels(config), *shape),
    )


def _scheduler_config(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Return the scheduler's configuration; its class is that of `model_index.json`, which stock diffusers loads."""
    from flcompress.models.configs import read_json

    config = read_json(folder / SCHEDULER_FILE, "a diffusers pipeline folder has one")
    named = index.get("scheduler")
    return {**config, "_class_name": named[1]} if named and named[1] else config


def _other_pipeline(recipe: Recipe, family: Family) -> str:
    """Return the pipeline class that the recipe names; RecipeError unless it is of the model's family."""
    name = str(recipe.model.pipeline)
    if name not in family.pipelines:
        raise RecipeError(
            f"{recipe.where('model')}.pipeline: {name} given, expected {' or '.join(family.pipelines)} for this model"
        )
    return name


def _latent_shape(recipe: Recipe, family: Family, config: dict[str, Any]) -> LatentShape:
    """Return (frames, height, width) of the latents at the size that the recipe samples."""
    from flcompress.models.inputs import SMALL_LATENTS
    from flcompress.models.latent_size import folder_grid

    size = recipe.sampling.size
    if size is None:
        return family.fixed_latents(config) or ((1, *SMALL_LATENTS[1:]) if family.image else SMALL_LATENTS)
    folder = recipe.model_folder()
    try:
        return folder_grid(folder / "transformer", folder / "vae").latents(*size, ("num_frames", "height", "width"))
    except RequestError as error:
        raise RecipeError(f"{recipe.where('sampling')}.{error}") from error


def _embedded_guidance(recipe: Recipe, family: Family, config: dict[str, Any]) -> float | None:
    """Return the guidance scale that a guidance-distilled network takes as an input.

    Raises:
        RecipeError: the recipe has one, but the network takes none.
    """
    scale = recipe.sampling.embedded_guidance
    if config.get("guidance_embeds"):
        return family.embedded_guidance if scale is None else scale
    if scale is not None:
        raise RecipeError(
            f"{recipe.file}: sampling.embedded_guidance: {scale:g} given, but the {family.name} transformer takes no "
            "guidance as an input; use guidance_scale"
        )
    return None


def trace_folder(transformer: Path, tokens: int, shape: LatentShape | None = None) -> BlockGraph:
    """Trace a transformer folder from its configuration.

    Args:
        transformer: the folder.
        tokens: length of the prompt.
        shape: (frames, height, width) of the latents; default: a small size.
    """
    path = transformer / "config.json"
    # A command checks a recipe first and then plans or runs it; tracing a deep model takes seconds.
    return _trace_blocks(transformer, path.read_bytes() if path.is_file() else b"", tokens, shape)


@lru_cache(maxsize=4)
def _trace_blocks(transformer: Path, config: bytes, tokens: int, shape: LatentShape | None) -> BlockGraph:
    """Trace a folder whose `config.json` has these bytes: other bytes are another model."""
    from flcompress.models.inputs import SMALL_LATENTS, example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.tracing.counting import graph_at
    from flcompress.tracing.tracer import trace

    model = meta_transformer(transformer)
    inputs = example_inputs(model, latent_shape=shape, tokens=tokens)
    small = shape is None or math.prod(shape) <= math.prod(SMALL_LATENTS)
    return trace(model, inputs) if small else graph_at(model, inputs)


def start_key(recipe: Recipe) -> str:
    """Return the cache key of the starting program: the contents of the model folder and how the model is sampled."""
    return key_of(
        start=VERSION,
        folder=folder_digest(recipe.model_folder()),
        expert=recipe.model.expert,
        partner=folder_digest(partner) if (partner := recipe.partner_folder()) else None,
        weights=recipe.model.weights,
        pipeline=recipe.model.pipeline,
        seed=recipe.seed if recipe.model.weights == "random" else None,
        sampling=recipe.sampling.decisive,
    )


def starting_program(recipe: Recipe, source: Source, folder: Path) -> Program:
    """Return the program before the first pass.

    Args:
        recipe: the recipe.
        source: its model.
        folder: where random weights are written if the recipe starts from them.
    """
    home, graph = source.folder, source.graph
    if recipe.model.weights == "random":
        from flcompress.models.loading import initialise_pipeline

        home = folder / "model"
        initialise_pipeline(source.folder, home, recipe.seed)
    return Program(
        graph=graph,
        index=source.index,
        latents=source.latents,
        components=components_of(recipe, source.index, home),
        contract=source.contract,
        teacher_contract=source.contract,
        facts=frozenset({Fact.TRAINED}) if recipe.model.weights == "trained" else frozenset(),
        kept={block.path: block.path for block in graph.blocks},
    )


def components_of(recipe: Recipe, index: Mapping[str, Any], home: Path) -> dict[str, Path]:
    """Return the component folders of the starting program.

    Args:
        recipe: the recipe.
        index: `model_index.json` of its model.
        home: folder of the model's weights.
    """
    from flcompress.models.parts import part_names

    parts = {name: home / name for name in part_names(index)}
    return parts | transformer_folders(recipe, home, read_experts(recipe, index))


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that the entry of the starting program records."""
    arguments = recipe.model.model_dump(mode="json", include={"weights", "expert"}, exclude_none=True)
    folder = recipe.model_folder()
    return {"path": str(folder), "sha256": folder_digest(folder), **arguments}


def read_experts(recipe: Recipe, index: Mapping[str, Any]) -> Experts | None:
    """Return the experts of the recipe's model; None for a model with one transformer.

    Args:
        recipe: the recipe.
        index: the model folder's `model_index.json`, checked.

    Raises:
        RecipeError: two experts and no choice between them, or a choice, or their arguments, for a single transformer.
    """
    ratio, model, sampling = index.get("boundary_ratio"), recipe.model, recipe.sampling
    if ratio is None:
        only_for_two = (
            ("model", "expert", model.expert),
            ("model", "partner", model.partner),
            ("sampling", "guidance_scale_2", sampling.guidance_scale_2),
        )
        for part, key, value in only_for_two:
            if value is not None:
                raise RecipeError(
                    f"{recipe.where(part)}.{key}: {value} given, but this {index['_class_name']} has one transformer; "
                    "leave it out"
                )
        return None
    if model.expert is None:
        raise RecipeError(
            f"{recipe.where('model')}.expert: nothing given, but this {index['_class_name']} has two experts; expected "
            f"high (transformer, timesteps from {ratio * 1000:g}) or low (transformer_2, those below): a recipe "
            "compresses one, and a second recipe the other"
        )
    return Experts(boundary_ratio=ratio, compressed=model.expert, guidance_scale=sampling.scale_2)


def with_partner(recipe: Recipe, teacher: SamplingContract, pipeline_sigmas: PipelineSigmas | None) -> SamplingContract:
    """Return the teacher's contract with the steps for which the recipe's partner was distilled, if it was.

    Raises:
        RecipeError: the partner is no export of another recipe for the other expert, or was made for another schedule;
            or the model itself is such an export.
    """
    folder = recipe.partner_folder()
    if (experts := teacher.experts) is not None and teacher.stochastic:
        raise RecipeError(
            f"{recipe.where('model')}.path: {recipe.model_folder()} is the few-step result of another recipe; give the "
            "model that one started from, and this folder as model.partner"
        )
    if folder is None or experts is None:
        return teacher
    where = f"{recipe.where('model')}.partner"
    partner = _contract(folder, where)
    wanted = OTHER[experts.compressed]
    if partner.experts is None or partner.experts.compressed != wanted:
        what = "a single transformer" if partner.experts is None else f"its {partner.experts.compressed}-noise expert"
        raise RecipeError(f"{where}: {folder} is a pipeline compressed at {what}, expected at the {wanted}-noise one")
    if partner.experts.boundary_ratio != experts.boundary_ratio:
        raise RecipeError(
            f"{where}: boundary_ratio {partner.experts.boundary_ratio:g} in {folder}, but this model's is "
            f"{experts.boundary_ratio:g}; expected an export of the same model"
        )
    if partner.sigmas == teacher.sigmas:
        return teacher
    steps = partner.num_inference_steps
    distilled = replace(teacher, experts=replace(experts, partner_steps=steps))
    sigmas = student_contract(distilled, steps, pipeline_sigmas).sigmas
    if partner.sigmas != sigmas:
        raise RecipeError(
            f"{where}: {folder} is sampled at sigmas {_few(partner.sigmas)}, a student of this model at "
            f"{_few(sigmas)}; expected an export of the same model, with the same sampling"
        )
    _check_steps(recipe, steps, where)
    return distilled


def transformer_folders(recipe: Recipe, home: Path, experts: Experts | None) -> dict[str, Path]:
    """Return the components of a starting program that are transformers.

    Args:
        recipe: the recipe.
        home: folder of the model's own weights.
        experts: the model's experts.
    """
    own = home / (COMPONENTS[experts.compressed] if experts else "transformer")
    folders = {"transformer": own, "original": own, "elastic": own}
    if experts is not None:
        name = COMPONENTS[OTHER[experts.compressed]]
        folders |= {"original_partner": home / name, "partner": (recipe.partner_folder() or home) / name}
    return folders


def _contract(folder: Path, where: str) -> SamplingContract:
    from flcompress.core.records import FactsFile  # dozens of models, which no check of a recipe needs
    from flcompress.models.folder import check_pipeline

    path = folder / FACTS_FILE
    if not path.is_file():
        raise RecipeError(
            f"{where}: {folder} has no {FACTS_FILE}; expected the diffusers export of another recipe, "
            "RUN/exports/diffusers"
        )
    check_pipeline(folder)
    return SamplingContract.from_dict(FactsFile.read_named(path, "", "export the pipeline again").contract.dump())


def _check_steps(recipe: Recipe, steps: int, where: str) -> None:
    """Raise RecipeError unless the recipe's student takes as many steps as the partner: both follow one schedule."""
    student_steps = [step.evaluations(0) for step in recipe.passes if Fact.FEW_STEP in step.gives]
    if student_steps != [steps]:
        fault = "no pass of this recipe gives few steps"
        if student_steps:
            fault = f"this recipe's student takes {student_steps[0]}"
        raise RecipeError(
            f"{where}: made for {steps} steps, but {fault}; expected a dmd pass with student_steps: {steps}"
        )


def _few(numbers: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{number:.4g}' for number in numbers[:4])}{', ...' if len(numbers) > 4 else ''}]"
