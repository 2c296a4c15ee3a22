"""Checks of a recipe's data before any work."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flcompress.data.index import NEGATIVE
from flcompress.driver.clips import grid_and_target
from flcompress.errors import DataError
from flcompress.frontend.recipe import Recipe


def check_data(recipe: Recipe, index: Mapping[str, Any]) -> None:
    """Raise DataError for anything wrong with a recipe's data that can be known before any work.

    Args:
        recipe: the recipe.
        index: `model_index.json` of its model, with the pipeline class that the recipe uses.
    """
    spec = recipe.data_spec()
    if spec is None:
        return
    ((kind, source),) = spec.items()
    if kind == "latents":
        _check_latents(recipe, index, Path(source))
    elif kind == "videos":
        from flcompress.data.captions import read_captions

        read_captions(Path(source["captions"]), Path(source["folder"]))
        grid_and_target(recipe)


def _check_latents(recipe: Recipe, index: Mapping[str, Any], folder: Path) -> None:
    from flcompress.data.index import Index, check_contents

    dataset = Index.read(folder)
    check_contents(folder, dataset)
    _check_origin(recipe, index, folder, dataset.request)
    if dataset.clip_shards:
        return
    for step in recipe.passes:
        if step.needs_clips:
            raise DataError(
                f"{recipe.where('data')}.latents: {folder}: this dataset holds prompts only, but {step.name} needs "
                "clips; encode one with --videos"
            )
    if recipe.sampling.size is None:
        raise DataError(
            f"{recipe.where('data')}.latents: {folder}: this dataset holds prompts only, which have no size; "
            "say in sampling: num_frames, height and width of what is sampled"
        )


def _check_origin(recipe: Recipe, index: Mapping[str, Any], folder: Path, request: dict[str, Any]) -> None:
    """Raise DataError unless the dataset was encoded for this pipeline, prompt length, negative prompt and parts."""
    from flcompress.data.encoding import parts_digests
    from flcompress.models.parts import part_names

    where = f"{recipe.where('data')}.latents: {folder}"
    model = recipe.model_folder()
    pipeline = index["_class_name"]
    if request.get("pipeline") != pipeline:
        raise DataError(
            f"{where}: encoded for {request.get('pipeline')}, expected {pipeline}; "
            f"encode with --pipeline-class {pipeline}"
        )
    length, wanted = request.get("max_sequence_length"), recipe.sampling.max_sequence_length
    if length != wanted:
        raise DataError(
            f"{where}: its prompts are padded to {length} tokens, expected sampling.max_sequence_length, {wanted}; "
            f"set that to {length}, or encode with --max-sequence-length {wanted}"
        )
    negative, expected = request.get(NEGATIVE, ""), recipe.sampling.negative_prompt
    if negative != expected:
        raise DataError(
            f"{where}: its negative prompt is {negative!r}, expected sampling.negative_prompt, {expected!r}; set that "
            f"to {negative!r}, or encode with --negative-prompt {shlex.quote(expected)}"
        )
    if recipe.model.weights == "random":
        return  # its parts do not exist yet
    names = ("transformer", *part_names(index))
    ours = parts_digests(index, {name: model / name for name in names})
    theirs = request.get("parts", {})
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise DataError(
            f"{where}: encoded by another {differing[0]} than that of {model}; encode with --pipeline {model}"
        )
