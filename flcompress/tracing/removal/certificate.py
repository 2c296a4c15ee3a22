"""The proof that a removal is what skipping was: stock diffusers loads the smaller model and answers the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flcompress.tracing.removal.cuts import Cut, cut_inputs
from flcompress.tracing.removal.sources import Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was removed, how the config changed, and how the saved and reloaded model compared with the skip.

    Where a kept block becomes one of another kind, such as the last of SD3, `chunked` says which tensors of the smaller
    model are rows of one of the model's, and `dropped` which of the model's tensors have no place in it any more. Where
    an argument of the forward has an entry for every block, `input_cuts` says which entries the smaller model is to be
    given it without.
    """

    model_class: str
    removed: tuple[str, ...]
    kept: Mapping[str, str]  # {old path: new path}
    config_changes: Mapping[str, tuple[Any, Any]]  # {key: (before, after)}
    inputs: tuple[str, ...]  # names of the forward's arguments that the check used
    max_abs_difference: float  # with the model's own weights; 0.0, or there is no certificate
    random_max_abs_difference: float  # with random weights, where no branch is zero by initialisation
    diffusers_version: str
    chunked: Mapping[str, Chunks] = field(default_factory=dict)  # {tensor of the smaller model: rows of one}
    dropped: tuple[str, ...] = ()  # tensors of kept blocks, by their names in the model
    input_cuts: Mapping[str, Cut] = field(default_factory=dict)  # {argument: the entries that it loses}

    def inputs_for(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward as the smaller model takes them."""
        return cut_inputs(inputs, self.input_cuts)
