"""Stock classes of a pipeline's parts, and how a folder's weights fit them by the rules of stock loading."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.families.registry import plugin_class
from flcompress.models.shards import StoredTensor

Shape = tuple[int, ...]

LIBRARIES = ("diffusers", "transformers")
"""A part of any other library would be code from the model folder, which is never run."""

WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "image_encoder")
"""How the names of components with weights begin."""


def stock_class(folder: Path, kind: Sequence[str]) -> Any:
    """Return the class of a component.

    Args:
        folder: the component's.
        kind: (library, class name), as `model_index.json` has it.

    Raises:
        ModelError: a library other than diffusers and transformers, or a class it does not have.
    """
    library, name = kind
    if (own := plugin_class(library, name)) is not None:
        return own
    if library not in LIBRARIES:
        raise ModelError(
            f"{folder.parent / 'model_index.json'}: {folder.name} is of library {library!r}, expected "
            f"{' or '.join(LIBRARIES)}; code of a model folder is not run"
        )
    with quiet_loading():
        model_class = getattr(importlib.import_module(library), str(name), None)
    if not isinstance(model_class, type):
        raise ModelError(
            f"{folder.parent / 'model_index.json'}: {folder.name} is a {name}, which this {library} does not have; "
            "install the version the model was saved with"
        )
    return model_class


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The fit of a folder's tensors to the model of its configuration, by the rules of stock loading.

    Attributes:
        missing: names that the model has and the folder lacks, ties aside: stock loading would draw them at random.
        unexpected: names that the model has no place for.
        shapes: name -> (the folder's shape, the model's), where they differ.
    """

    missing: frozenset[str]
    unexpected: frozenset[str]
    shapes: Mapping[str, tuple[Shape, Shape]]

    @classmethod
    def between(cls, stored: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Fit:
        """Compare {name: shape} of stored tensors with those that a model has."""
        return cls(
            missing=frozenset(expected.keys() - stored.keys()),
            unexpected=frozenset(stored.keys() - expected.keys()),
            shapes={
                name: (stored[name], shape)
                for name, shape in expected.items()
                if name in stored and stored[name] != shape
            },
        )


def state_shapes(model: torch.nn.Module) -> dict[str, Shape]:
    """Return {name: shape} of all that a model's state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def diffusers_fit(model: Any, stored: dict[str, StoredTensor], *, sharded: bool) -> Fit:
    """Return the fit to a model of diffusers; what stock loading renames (old attention blocks), `stored` does too."""
    if not sharded:
        model._fix_state_dict_keys_on_load(stored)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    expected = state_shapes(model)
    shapes = {
        name: tensor.shape
        for name, tensor in stored.items()
        if name in expected or not any(re.search(pattern, name) for pattern in ignored)
    }
    return Fit.between(shapes, expected)


def transformers_fit(factory: Any, config: Any, stored: Mapping[str, StoredTensor]) -> Fit:
    """Return the fit to a class of transformers: its own loading of tensors that have a shape and no numbers.

    So names are converted, prefixes cut and ties known as they will be when the part is loaded.
    """
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    with quiet_loading():
        _, info = factory.from_pretrained(
            None,
            config=config,
            state_dict=shapes,
            device_map={"": "meta"},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return Fit(
        missing=frozenset(info["missing_keys"]),
        unexpected=frozenset(info["unexpected_keys"]),
        shapes={name: (tuple(shape), tuple(expected)) for name, shape, expected in info["mismatched_keys"]},
    )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the bars that stock loading draws on stderr from overwriting the command's."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence stock loading's bars and its tables of what does not fit; for callers that report it themselves."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)
