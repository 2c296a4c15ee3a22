"""The families that are known: the built-in ones, those of installed packages, and those registered in this process.

A package adds one with an entry point, in its own `pyproject.toml`:

    [project.entry-points."flcompress.families"]
    my-family = "my_package.my_module:MyFamily"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from flcompress.errors import ModelError, RequestError
from flcompress.models.families.cogvideox import CogVideoX
from flcompress.models.families.family import Family
from flcompress.models.families.flux import Flux
from flcompress.models.families.hunyuan_video import HunyuanVideo
from flcompress.models.families.ltx import LTX
from flcompress.models.families.mochi import Mochi
from flcompress.models.families.qwen_image import QwenImage
from flcompress.models.families.stable_diffusion_3 import StableDiffusion3
from flcompress.models.families.wan import Wan

FAMILY_GROUP = "flcompress.families"

_families: list[Family] = [
    Wan(),
    HunyuanVideo(),
    CogVideoX(),
    LTX(),
    Mochi(),
    Flux(),
    StableDiffusion3(),
    QwenImage(),
]

FamilyClass = TypeVar("FamilyClass", bound=type[Family])


def register_family(family: FamilyClass) -> FamilyClass:
    """Make a family known in this process; also a class decorator.

    An entry point makes it known in every process, those that a command starts included.

    Raises:
        RequestError: another family has its name, or one of its classes.
    """
    if not any(type(known) is family for known in _families):
        _check_new(family)
        _families.append(family())
    return family


def known_families() -> tuple[Family, ...]:
    """Return every family, the built-in ones first."""
    _load_entry_points()
    return tuple(_families)


def find_family(class_name: str) -> Family | None:
    """Return the family of a pipeline or transformer class; None if no family knows it."""
    for family in known_families():
        if class_name in _classes(family):
            return family
    return None


def family_of(class_name: str) -> Family:
    """Return the family of a pipeline or transformer class.

    Raises:
        ModelError: no family has it; names those that are known.
    """
    family = find_family(class_name)
    if family is None:
        known = ", ".join(name for family in known_families() for name in family.pipelines)
        raise ModelError(f"{class_name}: no model family knows this class; expected a pipeline such as {known}")
    return family


def plugin_class(library: str, name: str) -> Any:
    """Return a family's own class, which `model_index.json` names by its module as (library, name); None if not one.

    The module is an installed one, never one of the model folder.
    """
    family = find_family(name)
    own = family.model_class(name) if family else None
    return own if getattr(own, "__module__", None) == library else None


def _classes(family: Family | type[Family]) -> tuple[str, ...]:
    return (*family.pipelines, *family.transformers)


def _check_new(family: type[Family]) -> None:
    for known in _families:
        if known.name == family.name:
            conflict = f"family {family.name!r}"
        elif both := sorted(set(_classes(known)) & set(_classes(family))):
            conflict = f"{both[0]} of family {family.name!r}"
        else:
            continue
        raise RequestError(
            f"{conflict} in {family.__module__}: registered already, by {type(known).__name__} in "
            f"{type(known).__module__}; rename one of the two"
        )


@cache
def _load_entry_points() -> None:
    for point in sorted(entry_points(group=FAMILY_GROUP), key=lambda point: point.name):
        try:
            family = point.load()
        except (ImportError, AttributeError) as error:
            raise RequestError(f"family '{point.name}': {point.value} cannot be imported ({error})") from error
        if not (isinstance(family, type) and issubclass(family, Family)):
            raise RequestError(f"family '{point.name}': {point.value} is not a subclass of Family")
        register_family(family)
