"""The proof that a removal is what skipping was: stock diffusers loads the smaller model and answers the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was removed, how the config changed, and how the saved and reloaded model compared with the skip."""

    model_class: str
    removed: tuple[str, ...]
    kept: Mapping[str, str]  # {old path: new path}
    config_changes: Mapping[str, tuple[Any, Any]]  # {key: (before, after)}
    inputs: tuple[str, ...]  # names of the forward's arguments that the check used
    max_abs_difference: float  # with the model's own weights; 0.0, or there is no certificate
    random_max_abs_difference: float  # with random weights, where no branch is zero by initialisation
    diffusers_version: str
