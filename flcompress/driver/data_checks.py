"""What can be known to be wrong with a recipe's data before any work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from flcompress.data.index import NEGATIVE
from flcompress.driver.clips import grid_and_target
from flcompress.errors import DataError
from flcompress.frontend.recipe import Recipe


def check_data(recipe: Recipe) -> None:
    """Raise DataError for anything wrong with a recipe's data that can be known before any work."""
    spec = recipe.data_spec()
    if spec is None:
        return
    ((kind, given),) = spec.items()
    if kind == "latents":
        _check_latents(recipe, Path(given))
    elif kind == "videos":
        from flcompress.data.captions import read_captions

        read_captions(Path(given["captions"]), Path(given["folder"]))
        grid_and_target(recipe)


def _check_latents(recipe: Recipe, folder: Path) -> None:
    from flcompress.data.index import Index, check_contents

    index = Index.read(folder)
    check_contents(folder, index)
    _check_origin(recipe, folder, index.request)
    if index.clip_shards:
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


def _check_origin(recipe: Recipe, folder: Path, request: dict[str, Any]) -> None:
    """Latents and embeddings mean nothing to a model with other parts."""
    from flcompress.data.encoding import parts_digests
    from flcompress.models.configs import read_json
    from flcompress.models.parts import part_names

    where = f"{recipe.where('data')}.latents: {folder}"
    model = recipe.model_folder()
    index = read_json(model / "model_index.json", "a diffusers pipeline folder has one")
    pipeline = recipe.model.pipeline or index["_class_name"]
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
    negative, meant = request.get(NEGATIVE, ""), recipe.sampling.negative_prompt
    if negative != meant:
        raise DataError(
            f"{where}: its negative prompt is {negative!r}, expected sampling.negative_prompt, {meant!r}; set that to "
            f"{negative!r}, or encode with --negative-prompt {shlex.quote(meant)}"
        )
    if recipe.model.weights == "random":
        return  # its parts do not exist yet
    names = ("transformer", *part_names(index))
    ours = parts_digests({**index, "_class_name": pipeline}, {name: model / name for name in names})
    theirs = request.get("parts", {})
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise DataError(
            f"{where}: encoded by another {differing[0]} than that of {model}; encode with --pipeline {model}"
        )
