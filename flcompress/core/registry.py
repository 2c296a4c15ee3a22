"""Passes and exporters by their recipe names: the built-in ones, and any that an installed package adds.

A package adds one with an entry point, in its own `pyproject.toml`:

    [project.entry-points."flcompress.passes"]
    my-pass = "my_package.my_module:MyPass"

Nothing is imported before it is asked for, so that listing names costs nothing and the core never imports upward.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points

from flcompress.core.steps import Exporter, Pass
from flcompress.errors import RecipeError

PASSES: dict[str, str] = {
    "importance": "flcompress.passes.importance:Importance",
    "stochastic-depth": "flcompress.passes.stochastic_depth:StochasticDepth",
    "prune": "flcompress.passes.prune:Prune",
    "dmd": "flcompress.passes.dmd:DistributionMatching",
    "train-autoencoder": "flcompress.passes.train_autoencoder:TrainAutoencoder",
    "pretrain": "flcompress.passes.pretrain:Pretrain",
}
EXPORTERS: dict[str, str] = {
    "diffusers": "flcompress.exporters.diffusers_folder:DiffusersExporter",
    "onnx": "flcompress.exporters.onnx_model:OnnxExporter",
    "tensorrt": "flcompress.exporters.tensorrt_engine:TensorRTExporter",
}
PASS_GROUP = "flcompress.passes"
EXPORTER_GROUP = "flcompress.exporters"


def known_passes() -> dict[str, str]:
    """Every pass that a recipe can name -> "module:Class"; the built-in ones first."""
    return _with_entry_points(PASSES, PASS_GROUP)


def known_exporters() -> dict[str, str]:
    """Every exporter that a recipe can name -> "module:Class"; the built-in ones first."""
    return _with_entry_points(EXPORTERS, EXPORTER_GROUP)


def find_pass(name: str) -> type[Pass]:
    """The pass class of that recipe name; RecipeError, with the nearest name, where there is none."""
    found = _load(name, known_passes(), "pass")
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise RecipeError(f"pass '{name}': {found!r} is not a subclass of flcompress.core.steps.Pass")
    return found


def find_exporter(name: str) -> type[Exporter]:
    """The exporter class of that recipe name; RecipeError, with the nearest name, where there is none."""
    found = _load(name, known_exporters(), "exporter")
    if not (isinstance(found, type) and issubclass(found, Exporter)):
        raise RecipeError(f"exporter '{name}': {found!r} is not a subclass of flcompress.core.steps.Exporter")
    return found


def find_step(name: str) -> type[Pass] | type[Exporter]:
    """The pass or exporter of that recipe name; RecipeError, with the nearest name, where there is none."""
    if name in known_exporters():
        return find_exporter(name)
    if name in known_passes():
        return find_pass(name)
    raise RecipeError(f"no pass or exporter '{name}'; {nearest(name, {**known_passes(), **known_exporters()})}")


def nearest(name: str, names: Mapping[str, object] | list[str]) -> str:
    """A closing half sentence: "did you mean 'prune'?", or all the names where none is near."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(names)) or 'none'}"


def _with_entry_points(built_in: Mapping[str, str], group: str) -> dict[str, str]:
    found = dict(built_in)
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        if found.setdefault(point.name, point.value) != point.value:
            raise RecipeError(
                f"entry point {group}: '{point.name}' is given as {point.value}, but that name is taken by "
                f"{found[point.name]}; rename it in the package that declares it"
            )
    return found


def _load(name: str, known: Mapping[str, str], what: str) -> object:
    if name not in known:
        raise RecipeError(f"no {what} '{name}'; {nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{what} '{name}': {known[name]} cannot be imported ({error})") from error
