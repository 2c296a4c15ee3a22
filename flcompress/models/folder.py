"""Is this folder a model we can safely load? Checked before any work, from names, headers and numbers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flcompress.errors import ModelError
from flcompress.models.families import FAMILIES

PIPELINES = tuple(name for family in FAMILIES for name in family.pipelines)
TRANSFORMERS = tuple(name for family in FAMILIES for name in family.transformers)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_pipeline(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """Check a diffusers pipeline folder and return its `model_index.json`.

    Args:
        folder: the pipeline folder.
        weights: also check every weight file (safetensors only, complete, finite). False for a folder of
            configurations that a recipe starts from at random.

    Raises:
        ModelError: missing, not a pipeline, of a class not handled, pickled, truncated or not finite.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; expected a diffusers pipeline folder with model_index.json")
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{folder / 'model_index.json'}: _class_name is {name!r}, expected {' or '.join(PIPELINES)}")
    parts = [part for part, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    for component in parts:
        if not (folder / component).is_dir():
            raise ModelError(f"{folder / component}: no such folder; model_index.json of a {name} names it")
    check_transformer_config(folder / "transformer")
    if weights:
        for component in parts:
            if component.startswith(("transformer", "vae", "text_encoder", "image_encoder")):
                check_weights(folder / component)
    return index


def check_transformer_config(folder: Path) -> dict[str, Any]:
    """Check a transformer's `config.json` and return it."""
    config = read_json(folder / "config.json", "a diffusers model folder has one")
    name = config.get("_class_name")
    if name not in TRANSFORMERS:
        raise ModelError(
            f"{folder / 'config.json'}: _class_name is {name!r}, expected {' or '.join(TRANSFORMERS)}; "
            "only these diffusion transformers are handled so far"
        )
    return config


def check_weights(folder: Path) -> None:
    """Every weight file of a component is safetensors, whole, and finite.

    Raises:
        ModelError: names the file (and the tensor) and what is wrong.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickled:
            raise ModelError(
                f"{pickled[0]}: a pickle checkpoint can run code when loaded and is refused; expected *.safetensors; "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise ModelError(f"{folder}: no weights; expected *.safetensors")
    shards = folder.glob("*.safetensors.index.json")
    for index in shards:
        wanted = set(read_json(index, "").get("weight_map", {}).values())
        missing = sorted(wanted - {path.name for path in files})
        if missing:
            raise ModelError(f"{folder / missing[0]}: missing; {index.name} names it; copy the shard again")
    for path in files:
        _check_safetensors(path)


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names it."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON {type(value).__name__} given, expected an object")
    return value


def _check_safetensors(path: Path) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ModelError(
                        f"{path}: tensor {key} holds values that are not finite; copy the file again "
                        "or go back to an earlier checkpoint"
                    )
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); copy the file again") from error
