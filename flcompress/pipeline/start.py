"""The program a recipe starts from: a model folder, traced from its configuration alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.diffusion.contract import SamplingContract
from flcompress.ir.graph import BlockGraph
from flcompress.pipeline.program import Fact, Program, folder_digest
from flcompress.pipeline.recipe import Recipe
from flcompress.pipeline.store import key_of

COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
VERSION = 1
"""Raise it when tracing gives another graph for the same model: it is part of the key."""


@dataclass(frozen=True)
class Source:
    """What a recipe starts from, before anything is written.

    Attributes:
        folder: the model folder.
        graph: the transformer's block graph.
        contract: how the model is sampled.
        pipeline_class: as `model_index.json` names it.
    """

    folder: Path
    graph: BlockGraph
    contract: SamplingContract
    pipeline_class: str


def read_source(recipe: Recipe) -> Source:
    """Trace the recipe's model and read its scheduler; no weights are loaded."""
    from flcompress.diffusion.contract import contract_of
    from flcompress.models.folder import read_json

    folder = recipe.model_folder()
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "a diffusers pipeline folder has one")
    contract = contract_of(
        scheduler,
        num_inference_steps=recipe.sampling.num_inference_steps,
        guidance_scale=recipe.sampling.scale,
        max_sequence_length=recipe.sampling.max_sequence_length,
    )
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    graph = trace_folder(folder / "transformer", contract.max_sequence_length)
    return Source(folder, graph, contract, index["_class_name"])


def trace_folder(transformer: Path, tokens: int) -> BlockGraph:
    """The block graph of a transformer folder, from its configuration, for prompts of `tokens` tokens."""
    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.trace.tracer import trace

    model = meta_transformer(transformer)
    return trace(model, example_inputs(model, tokens=tokens))


def start_key(recipe: Recipe) -> str:
    """Cache key of the starting program: what the folder holds and how it is to be sampled."""
    return key_of(
        start=VERSION,
        folder=folder_digest(recipe.model_folder()),
        weights=recipe.model.weights,
        seed=recipe.seed if recipe.model.weights == "random" else None,
        sampling=recipe.sampling.model_dump(mode="json"),
    )


def starting_program(recipe: Recipe, folder: Path) -> Program:
    """The program before the first pass; random weights, where the recipe starts from them, are written to `folder`."""
    source = read_source(recipe)
    home = source.folder
    if recipe.model.weights == "random":
        from flcompress.models.loading import initialise_pipeline

        home = folder / "model"
        initialise_pipeline(source.folder, home, recipe.seed)
    components = {name: home / name for name in COMPONENTS}
    components |= {"original": home / "transformer", "elastic": home / "transformer"}
    return Program(
        graph=source.graph,
        components=components,
        contract=source.contract,
        teacher_contract=source.contract,
        facts=frozenset({Fact.TRAINED}) if recipe.model.weights == "trained" else frozenset(),
        kept={block.path: block.path for block in source.graph.blocks},
        pipeline_class=source.pipeline_class,
    )


def model_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the entry of the starting program says it was made from."""
    return {"path": str(recipe.model_folder()), "weights": recipe.model.weights}
