"""Passes, exporters, back ends and evaluation suites by name: the built-in ones, and any that a package adds.

A package adds one with an entry point, in its own `pyproject.toml`:

    [project.entry-points."flcompress.passes"]
    my-pass = "my_package.my_module:MyPass"

Nothing is imported before it is asked for, so that listing names costs nothing and the core never imports upward.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points

from flcompress.core.backend import Backend
from flcompress.core.steps import Exporter, Pass
from flcompress.core.suites import Suite
from flcompress.errors import RecipeError

PASSES: dict[str, str] = {
    "importance": "flcompress.passes.importance:Importance",
    "temporal-attention": "flcompress.passes.temporal_attention:TemporalAttention",
    "select": "flcompress.passes.select:Select",
    "stochastic-depth": "flcompress.passes.stochastic_depth:StochasticDepth",
    "prune": "flcompress.passes.prune:Prune",
    "feature-distill": "flcompress.passes.feature_distill:FeatureDistill",
    "dmd": "flcompress.passes.dmd:DistributionMatching",
    "consistency": "flcompress.passes.consistency:Consistency",
    "interpolate": "flcompress.passes.interpolate:Interpolate",
    "train-autoencoder": "flcompress.passes.train_autoencoder:TrainAutoencoder",
    "pretrain": "flcompress.passes.pretrain:Pretrain",
}
EXPORTERS: dict[str, str] = {
    "diffusers": "flcompress.exporters.diffusers_folder:DiffusersExporter",
    "onnx": "flcompress.exporters.onnx_model:OnnxExporter",
    "tensorrt": "flcompress.exporters.tensorrt_engine:TensorRTExporter",
    "torch-tensorrt": "flcompress.exporters.torch_tensorrt_engines:TorchTensorRTExporter",
}
BACKENDS: dict[str, str] = {
    "torch": "flcompress.runtime.backends.torch_backend:TorchBackend",
    "compile": "flcompress.runtime.backends.torch_backend:CompileBackend",
    "onnx": "flcompress.runtime.backends.onnx_backend:OnnxBackend",
    "tensorrt": "flcompress.runtime.backends.tensorrt_backend:TensorRTBackend",
    "torch-tensorrt": "flcompress.runtime.backends.torch_tensorrt_backend:TorchTensorRTBackend",
}
SUITES: dict[str, str] = {
    "moving-digits": "flcompress.evaluation.comparison:MovingDigits",
    "proxies": "flcompress.evaluation.suites.proxies:Proxies",
    "fvd": "flcompress.evaluation.suites.fvd:FrechetVideoDistance",
    "vbench-i2v": "flcompress.evaluation.vbench.suite:VBenchI2V",
}
PASS_GROUP = "flcompress.passes"
EXPORTER_GROUP = "flcompress.exporters"
BACKEND_GROUP = "flcompress.backends"
SUITE_GROUP = "flcompress.suites"


def known_passes() -> dict[str, str]:
    """Return recipe name -> "module:Class" of every installed pass, the built-in ones first."""
    return _with_entry_points(PASSES, PASS_GROUP)


def known_exporters() -> dict[str, str]:
    """Return recipe name -> "module:Class" of every installed exporter, the built-in ones first."""
    return _with_entry_points(EXPORTERS, EXPORTER_GROUP)


def known_backends() -> dict[str, str]:
    """Return name -> "module:Class" of every installed back end, the built-in ones first."""
    return _with_entry_points(BACKENDS, BACKEND_GROUP)


def known_suites() -> dict[str, str]:
    """Return name -> "module:Class" of every installed evaluation suite, the built-in ones first."""
    return _with_entry_points(SUITES, SUITE_GROUP)


def find_pass(name: str) -> type[Pass]:
    """Return the pass class of a recipe name; raise RecipeError, with the nearest name, if there is none."""
    kind = _load(name, known_passes(), "pass")
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise RecipeError(f"pass '{name}': {kind!r} is not a subclass of flcompress.core.steps.Pass")
    return kind


def find_exporter(name: str) -> type[Exporter]:
    """Return the exporter class of a recipe name; raise RecipeError, with the nearest name, if there is none."""
    kind = _load(name, known_exporters(), "exporter")
    if not (isinstance(kind, type) and issubclass(kind, Exporter)):
        raise RecipeError(f"exporter '{name}': {kind!r} is not a subclass of flcompress.core.steps.Exporter")
    return kind


def find_backend(name: str) -> type[Backend]:
    """Return the back end class of a name; raise RecipeError, with the nearest name, if there is none."""
    kind = _load(name, known_backends(), "backend")
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise RecipeError(f"backend '{name}': {kind!r} is not a subclass of flcompress.core.backend.Backend")
    return kind


def find_suite(name: str) -> type[Suite]:
    """Return the suite class of a name; raise RequestError, with the nearest name, if there is none."""
    kind = _load(name, known_suites(), "suite")
    if not (isinstance(kind, type) and issubclass(kind, Suite)):
        raise RecipeError(f"suite '{name}': {kind!r} is not a subclass of flcompress.core.suites.Suite")
    return kind


def find_step(name: str) -> type[Pass] | type[Exporter]:
    """Return the pass or exporter of a recipe name; raise RecipeError, with the nearest name, if there is none."""
    if name in known_exporters():
        return find_exporter(name)
    if name in known_passes():
        return find_pass(name)
    raise RecipeError(f"no pass or exporter '{name}'; {nearest(name, {**known_passes(), **known_exporters()})}")


def nearest(name: str, names: Mapping[str, object] | list[str]) -> str:
    """Return the end of a message: "did you mean 'prune'?", or all names if none is near."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(names)) or 'none'}"


def _with_entry_points(built_in: Mapping[str, str], group: str) -> dict[str, str]:
    known = dict(built_in)
    for point in sorted(_entry_points(group, tuple(sys.path)), key=lambda point: point.name):
        if known.setdefault(point.name, point.value) != point.value:
            raise RecipeError(
                f"entry point {group}: '{point.name}' is given as {point.value}, but that name is taken by "
                f"{known[point.name]}; rename it in the package that declares it"
            )
    return known


@lru_cache(maxsize=4)
def _entry_points(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Return a group's entry points of all packages on `path`; once, since every package's metadata is read."""
    return entry_points(group=group)


def _load(name: str, known: Mapping[str, str], what: str) -> object:
    if name not in known:
        raise RecipeError(f"no {what} '{name}'; {nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{what} '{name}': {known[name]} cannot be imported ({error})") from error
