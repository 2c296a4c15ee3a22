"""The transformer that a `config.json` describes, and whether its values are plausible; checked before any building.

Stock diffusers fills a missing key with its default and ignores one that it does not know, so a misspelt `num_layers`
silently gives another model. Here that is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flcompress.errors import ModelError

SIZES = re.compile(r"(num|n)_(\w+_)?(layers|heads|blocks)|nlayers|(dit_)?depth|(attention_)?head_dim|hidden_size")
"""Keys that say how large a model is. Older files may lack other keys, whose defaults then hold."""

LARGEST_COUNT, LARGEST_WIDTH = 1_000, 1_000_000
"""Larger numbers would take minutes to build before they could be reported."""

# What a constructor may raise on a configuration that makes no sense.
BUILD_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
)


def transformer_class(config: Mapping[str, Any], path: Path) -> Any:
    """Return the class that `config`, read from `path`, names.

    Raises:
        ModelError: no class named, one of another kind (a U-Net, an autoencoder), or an unknown one.
    """
    import diffusers
    from diffusers.models import transformers as stock

    from flcompress.models.families import find_family  # as diffusers, it comes with torch

    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ModelError(
            f"{path}: names no _class_name; expected a diffusers transformer such as WanTransformer3DModel"
        )
    family = find_family(name)
    model_class = family.model_class(name) if family else getattr(stock, name, None)
    if _is_model(model_class):
        return model_class
    if name.startswith("UNet") or "UNet" in name:
        raise ModelError(f"{path}: {name} is a U-Net; only diffusion transformers are handled")
    if _is_model(getattr(diffusers, name, None)):
        raise ModelError(f"{path}: {name} is no diffusion transformer; only those are handled")
    known = sorted(candidate for candidate in vars(stock) if _is_model(getattr(stock, candidate)))
    nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0))
    raise ModelError(
        f"{path}: _class_name {name!r} is no transformer of diffusers {diffusers.__version__}; nearest: {nearest}"
    )


def check_config(config: Mapping[str, Any], path: Path) -> type[Any]:
    """Check the keys and the values of a transformer's configuration, and return its class.

    Raises:
        ModelError: names the key, what was given and what was expected.
    """
    model_class: type[Any] = transformer_class(config, path)
    arguments = _arguments(model_class)
    absent = [key for key in arguments if key not in config]
    for key in config:
        # Files of released models hold keys that mean nothing any more; one that is nearly another is misspelt.
        nearest = get_close_matches(key, absent, n=1, cutoff=0.8) if key not in arguments else []
        if nearest:
            raise ModelError(f"{path}: {model_class.__name__} has no setting {key!r}; did you mean {nearest[0]!r}?")
    for key, default in arguments.items():
        if key not in config:
            if default is inspect.Parameter.empty or (type(default) is int and SIZES.fullmatch(key)):
                raise ModelError(
                    f"{path}: lacks {key!r}, which decides the size of a {model_class.__name__}; copy it again"
                )
        else:
            _check_value(config[key], default, key, path)
    return model_class


def check_transformer_config(folder: Path) -> dict[str, Any]:
    """Check a transformer's `config.json`, keys and values, and return it."""
    config = read_json(folder / "config.json", "a diffusers model folder has one")
    check_config(config, folder / "config.json")
    return config


def read_json(path: Path, why: str, fix: str = "copy the file again") -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        why: who needs it, for the message where there is none.
        fix: what to do about a damaged one.

    Raises:
        ModelError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; {why}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON {type(value).__name__} given, expected an object; {fix}")
    return value


def read_index(folder: Path) -> dict[str, Any]:
    """Return the `model_index.json` of a diffusers pipeline folder.

    Raises:
        ModelError: no such file, or no JSON object in it.
    """
    return read_json(folder / "model_index.json", "a diffusers pipeline folder has one")


def settings(config: Mapping[str, Any], stock: type[Any]) -> dict[str, Any]:
    """Return the entries of a configuration that the class knows; diffusers warns of the others at every build."""
    known = _arguments(stock)
    return {key: value for key, value in config.items() if key in known or key.startswith("_")}


def build_error(error: Exception, name: str, path: Path) -> ModelError:
    """Return the error for a configuration from which diffusers cannot build a model."""
    first = str(error).partition("\n")[0]
    return ModelError(f"{path}: no {name} can be built from these values ({type(error).__name__}: {first}); fix them")


def _arguments(stock: type[Any]) -> dict[str, Any]:
    """Return {name: default} of the constructor's parameters."""
    parameters = list(inspect.signature(stock.__init__).parameters.values())[1:]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _check_value(value: Any, default: Any, key: str, path: Path) -> None:
    if type(default) is int and SIZES.fullmatch(key):
        # One of several stacks may have lost all its blocks.
        counts = re.search("layers|blocks|depth", key) is not None
        smallest, largest = (0, LARGEST_COUNT) if counts else (1, LARGEST_WIDTH)
        if type(value) is not int or not smallest <= value <= largest:
            raise ModelError(f"{path}: {key} is {value!r}, expected a whole number from {smallest} to {largest:,}")
        return
    if value is None:
        return
    for kinds, allowed, expected in (
        ((bool,), (bool,), "true or false"),
        ((int,), (int, list, tuple), "a whole number"),
        ((float,), (int, float, list, tuple), "a number"),
        ((str,), (str, list, tuple), "text"),
        ((list, tuple), (list, tuple, int), "a list"),
    ):
        if type(default) in kinds:
            if type(value) not in allowed:
                raise ModelError(f"{path}: {key} is {value!r}, expected {expected}")
            return


def _is_model(value: Any) -> bool:
    from diffusers import ModelMixin

    return isinstance(value, type) and issubclass(value, ModelMixin)
