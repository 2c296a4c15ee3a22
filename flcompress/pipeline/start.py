"""The program a recipe starts from: a model folder, traced from its configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.diffusion.contract import SamplingContract
from flcompress.errors import RecipeError, RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.pipeline.program import Fact, Program, folder_digest
from flcompress.pipeline.recipe import Recipe
from flcompress.pipeline.store import key_of

if TYPE_CHECKING:
    from flcompress.models.families.family import Family, LatentShape

VERSION = 2
"""Raise it when tracing gives another graph for the same model: it is part of the key."""


@dataclass(frozen=True)
class Source:
    """What a recipe starts from, before anything is written.

    Attributes:
        folder: the model folder.
        graph: the transformer's block graph.
        contract: how the model is sampled.
        index: its `model_index.json`.
        latents: (channels, frames, height, width) of the latents that are sampled.
    """

    folder: Path
    graph: BlockGraph
    contract: SamplingContract
    index: dict[str, Any]
    latents: tuple[int, int, int, int]


def read_source(recipe: Recipe) -> Source:
    """Trace the recipe's model and read its scheduler; no weights are loaded."""
    from flcompress.diffusion.contract import contract_of
    from flcompress.models.families import family_of
    from flcompress.models.folder import check_transformer_config, read_json

    folder, sampling = recipe.model_folder(), recipe.sampling
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "a diffusers pipeline folder has one")
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    family = family_of(index["_class_name"])
    if recipe.model.pipeline is not None:
        index["_class_name"] = _other_pipeline(recipe, family)
    config = check_transformer_config(folder / "transformer")
    shape = _latent_shape(recipe, family, config)
    contract = contract_of(
        scheduler,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.scale,
        max_sequence_length=sampling.max_sequence_length,
        embedded_guidance=_embedded_guidance(recipe, family, config),
        pipeline_sigmas=family.sigmas,
        mu=family.mu(scheduler, config, shape),
    )
    graph = trace_folder(folder / "transformer", contract.max_sequence_length, shape)
    return Source(folder, graph, contract, index, (family.channels(config), *shape))


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
    from flcompress.trace.counting import graph_at
    from flcompress.trace.tracer import trace

    model = meta_transformer(transformer)
    inputs = example_inputs(model, latent_shape=shape, tokens=tokens)
    small = shape is None or math.prod(shape) <= math.prod(SMALL_LATENTS)
    return trace(model, inputs) if small else graph_at(model, inputs)


def start_key(recipe: Recipe) -> str:
    """Cache key of the starting program: what the folder holds and how it is to be sampled."""
    return key_of(
        start=VERSION,
        folder=folder_digest(recipe.model_folder()),
        weights=recipe.model.weights,
        pipeline=recipe.model.pipeline,
        seed=recipe.seed if recipe.model.weights == "random" else None,
        sampling=recipe.sampling.model_dump(mode="json"),
    )


def starting_program(recipe: Recipe, folder: Path) -> Program:
    """The program before the first pass; random weights, where the recipe starts from them, are written to `folder`."""
    from flcompress.models.parts import part_names

    source = read_source(recipe)
    home = source.folder
    if recipe.model.weights == "random":
        from flcompress.models.loading import initialise_pipeline

        home = folder / "model"
        initialise_pipeline(source.folder, home, recipe.seed)
    components = {name: home / name for name in ("transformer", *part_names(source.index))}
    components |= {"original": home / "transformer", "elastic": home / "transformer"}
    return Program(
        graph=source.graph,
        index=source.index,
        latents=source.latents,
        components=components,
        contract=source.contract,
        teacher_contract=source.contract,
        facts=frozenset({Fact.TRAINED}) if recipe.model.weights == "trained" else frozenset(),
        kept={block.path: block.path for block in source.graph.blocks},
    )


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the entry of the starting program says it was made from."""
    return {"path": str(recipe.model_folder()), "weights": recipe.model.weights}
