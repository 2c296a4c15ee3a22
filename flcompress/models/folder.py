"""Checks, before any work, that a folder is a model that can be loaded safely: names, headers and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flcompress.errors import ModelError
from flcompress.models.configs import check_transformer_config, read_index
from flcompress.models.families import family_of, known_families
from flcompress.models.part_check import check_part
from flcompress.models.shards import check_finite, index_positions
from flcompress.models.stock import WITH_WEIGHTS
from flcompress.models.stock_files import PICKLES, required_files


def check_pipeline(folder: Path, *, weights: bool = True, parts: bool = True) -> dict[str, Any]:
    """Check a diffusers pipeline folder and return its `model_index.json`.

    Args:
        folder: the pipeline folder.
        weights: also check every weight file (safetensors only, complete, finite). False for a folder of
            configurations that a recipe starts from at random.
        parts: also ask for the text encoders and whatever else is needed to run it, not only to plan.

    Raises:
        ModelError: missing, not a pipeline, of a class not handled, pickled, truncated or not finite.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; expected a diffusers pipeline folder with model_index.json")
    index = read_index(folder)
    name = index.get("_class_name")
    pipelines = [name for family in known_families() for name in family.pipelines]
    if name not in pipelines:
        raise ModelError(f"{folder / 'model_index.json'}: _class_name is {name!r}, expected {' or '.join(pipelines)}")
    named = [part for part, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    transformers = _transformers(folder, index)
    for component in named if parts else (*transformers, "vae", "scheduler"):
        if not (folder / component).is_dir():
            raise ModelError(f"{folder / component}: no such folder; model_index.json of a {name} names it")
    for component in transformers:
        class_name, expected = check_transformer_config(folder / component)["_class_name"], family_of(name).transformers
        if class_name not in expected:
            path = folder / component / "config.json"
            raise ModelError(f"{path}: _class_name is {class_name!r}, expected {' or '.join(expected)} in a {name}")
    if parts:
        check_parts(folder, weights=weights)
    if weights:
        for component in named:
            if component.startswith(WITH_WEIGHTS):
                check_weights(folder / component)
    return index


def check_parts(folder: Path, *, weights: bool = True, quantized: bool = False) -> None:
    """Check, from headers alone, that every component of a pipeline folder loads completely; see `check_part`.

    Args:
        folder: the pipeline folder.
        weights: also those that have weights; False for a folder of configurations.
        quantized: whether its transformers may be quantised, as an export is.

    Raises:
        ModelError: as `check_part`.
    """
    for component, kind in read_index(folder).items():
        if isinstance(kind, list) and len(kind) == 2 and kind[0] is not None and component != "scheduler":
            is_transformer = component.startswith("transformer")
            check_part(folder / component, kind, weights=weights, quantized=quantized and is_transformer)


def _transformers(folder: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the pipeline's transformers: one, or two experts.

    Raises:
        ModelError: a combination of which the stock pipeline would ignore a part.
    """
    path, ratio = folder / "model_index.json", index.get("boundary_ratio")
    first, second = (bool((index.get(name) or [None])[0]) for name in ("transformer", "transformer_2"))
    if not first and second:
        raise ModelError(
            f"{path}: transformer is null and transformer_2 is given: the low-noise expert alone; expected both, since "
            "a clip starts from pure noise"
        )
    if second and ratio is None:
        raise ModelError(
            f"{path}: transformer_2 is given without boundary_ratio, so the stock pipeline would never call it; "
            "set boundary_ratio (Wan 2.2 A14B: 0.875 from text, 0.9 from an image), or transformer_2 to [null, null]"
        )
    if ratio is None:
        return ("transformer",)
    if not second:
        raise ModelError(
            f"{path}: boundary_ratio is {ratio} without a transformer_2 for the timesteps below; set it to null, or "
            "add the low-noise expert"
        )
    if not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0:
        raise ModelError(f"{path}: boundary_ratio is {ratio!r}, expected a number between 0 and 1")
    return ("transformer", "transformer_2")


def only_configurations(folder: Path) -> bool:
    """Tell whether a pipeline folder holds no weights at all: enough to plan with and to inspect."""
    kinds = (".safetensors", *PICKLES)
    return not any(path.suffix in kinds and not path.name.startswith(".") for path in folder.rglob("*"))


def check_weights(folder: Path) -> None:
    """Check that every weight file that stock loading reads of a component is safetensors, whole, and finite.

    Raises:
        ModelError: names the file (and the tensor) and what is wrong.
    """
    weights = required_files(folder)
    if weights.index:
        index_positions(weights.index)
    for path in weights.files:
        check_finite(path)
