"""The program a recipe starts from: a model folder, traced from its configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.core.program import Fact, Program
from flcompress.diffusion.contract import SamplingContract
from flcompress.driver.experts import read_experts, transformer_folders, with_partner
from flcompress.errors import ModelError, RecipeError, RequestError
from flcompress.files import key_of
from flcompress.frontend.recipe import Recipe
from flcompress.ir.graph import BlockGraph
from flcompress.models.stock_files import folder_digest

if TYPE_CHECKING:
    from flcompress.models.families.family import Family, LatentShape

VERSION = 3
"""Raise it when the same model and recipe give another program: it is part of the key."""

SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    folder: Path
    transformer: Path
    contract: SamplingContract
    index: dict[str, Any]
    latents: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Source(_Sampled):
    """What a recipe starts from, before anything is written.

    Attributes:
        folder: the model folder.
        transformer: the folder of the transformer that is compressed.
        graph: its block graph.
        contract: how the model is sampled.
        index: its `model_index.json`.
        latents: (channels, frames, height, width) of the latents that are sampled.
    """

    graph: BlockGraph


def read_source(recipe: Recipe) -> Source:
    """Trace the recipe's model and read its scheduler; no weights are loaded."""
    model = _sampled(recipe)
    graph = trace_folder(model.transformer, model.contract.max_sequence_length, model.latents[1:])
    return Source(**vars(model), graph=graph)


def check_sampling(recipe: Recipe) -> None:
    """RequestError, before any work, where the recipe's model cannot be sampled as the recipe says.

    Its scheduler and that of a student, its experts and their partner, the size, and a negative prompt that nothing
    would use.
    """
    from flcompress.diffusion.student import student_contract
    from flcompress.models.families import family_of

    model = _sampled(recipe)
    contract, sigmas = model.contract, family_of(model.index["_class_name"]).sigmas
    for step in recipe.passes:
        if Fact.FEW_STEP in step.gives:
            student_contract(contract, step.evaluations(contract.evaluations), sigmas)
    if contract.negative_prompt and not contract.guided and not any(step.guides for step in recipe.passes):
        raise RecipeError(
            f"{recipe.where('sampling')}.negative_prompt: given, but neither the model (guidance_scale 1) nor a pass "
            "guides by text, so it has no effect; leave it out or set sampling.guidance_scale"
        )


def _sampled(recipe: Recipe) -> _Sampled:
    from flcompress.diffusion.contract import contract_of
    from flcompress.models.configs import check_transformer_config, read_json
    from flcompress.models.families import family_of

    folder, sampling = recipe.model_folder(), recipe.sampling
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
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
    return _Sampled(
        folder=folder,
        transformer=transformer,
        contract=with_partner(recipe, contract, family.sigmas),
        index=index,
        latents=(family.channels(config), *shape),
    )


def _scheduler_config(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration; its class is the one that stock diffusers loads, that of `model_index.json`."""
    from flcompress.models.configs import read_json

    config = read_json(folder / SCHEDULER_FILE, "a diffusers pipeline folder has one")
    named = index.get("scheduler")
    return {**config, "_class_name": named[1]} if named and named[1] else config


def _other_pipeline(recipe: Recipe, family: Family) -> str:
    """The pipeline class that the recipe names, which must be of the model's family."""
    name = str(recipe.model.pipeline)
    if name not in family.pipelines:
        raise RecipeError(
            f"{recipe.where('model')}.pipeline: {name} given, expected {' or '.join(family.pipelines)} for this model"
        )
    return name


def _latent_shape(recipe: Recipe, family: Family, config: dict[str, Any]) -> LatentShape:
    """(frames, height, width) of the latents at the size that the recipe samples."""
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
    """The scale a guidance-distilled network is told; RequestError where one is given to a network that takes none."""
    given = recipe.sampling.embedded_guidance
    if config.get("guidance_embeds"):
        return family.embedded_guidance if given is None else given
    if given is not None:
        raise RecipeError(
            f"{recipe.file}: sampling.embedded_guidance: {given:g} given, but the {family.name} transformer takes no "
            "guidance as an input; use guidance_scale"
        )
    return None


def trace_folder(transformer: Path, tokens: int, shape: LatentShape | None = None) -> BlockGraph:
    """The block graph of a transformer folder, from its configuration, for prompts of `tokens` tokens."""
    path = transformer / "config.json"
    # A command checks a recipe first and then plans or runs it; tracing a deep model takes seconds.
    return _traced(transformer, path.read_bytes() if path.is_file() else b"", tokens, shape)


@lru_cache(maxsize=4)
def _traced(transformer: Path, config: bytes, tokens: int, shape: LatentShape | None) -> BlockGraph:
    """`config` is what the folder held: another one is another model."""
    from flcompress.models.inputs import SMALL_LATENTS, example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.tracing.counting import graph_at
    from flcompress.tracing.tracer import trace

    model = meta_transformer(transformer)
    inputs = example_inputs(model, latent_shape=shape, tokens=tokens)
    small = shape is None or math.prod(shape) <= math.prod(SMALL_LATENTS)
    return trace(model, inputs) if small else graph_at(model, inputs)


def start_key(recipe: Recipe) -> str:
    """Cache key of the starting program: what the folder holds and how it is to be sampled."""
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


def starting_program(recipe: Recipe, folder: Path) -> Program:
    """The program before the first pass; random weights, where the recipe starts from them, are written to `folder`."""
    source = read_source(recipe)
    home = source.folder
    if recipe.model.weights == "random":
        from flcompress.models.loading import initialise_pipeline

        home = folder / "model"
        initialise_pipeline(source.folder, home, recipe.seed)
    return Program(
        graph=source.graph,
        index=source.index,
        latents=source.latents,
        components=components_of(recipe, home),
        contract=source.contract,
        teacher_contract=source.contract,
        facts=frozenset({Fact.TRAINED}) if recipe.model.weights == "trained" else frozenset(),
        kept={block.path: block.path for block in source.graph.blocks},
    )


def components_of(recipe: Recipe, home: Path) -> dict[str, Path]:
    """Component folders of the starting program, whose model lies in `home`."""
    from flcompress.models.configs import read_json
    from flcompress.models.parts import part_names

    index = read_json(recipe.model_folder() / "model_index.json", "a diffusers pipeline folder has one")
    parts = {name: home / name for name in part_names(index)}
    return parts | transformer_folders(recipe, home, read_experts(recipe, index))


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the entry of the starting program says it was made from."""
    given = recipe.model.model_dump(mode="json", include={"weights", "expert"}, exclude_none=True)
    folder = recipe.model_folder()
    return {"path": str(folder), "sha256": folder_digest(folder), **given}
