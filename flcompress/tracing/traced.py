"""The graph of every model that was traced, for as long as the model lives and its lists keep their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flcompress.ir.graph import BlockGraph
from flcompress.tracing.call import blank, fill


@dataclass(frozen=True, slots=True)
class _Traced:
    graph: BlockGraph
    inputs: Any  # blanked


_traced: WeakKeyDictionary[nn.Module, _Traced] = WeakKeyDictionary()


def keep(model: nn.Module, inputs: Mapping[str, Any], graph: BlockGraph) -> None:
    """Remember what `model` was found to be."""
    _traced[model] = _Traced(graph, blank(dict(inputs)))


def recall(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> BlockGraph | None:
    """The graph that was kept, None where the model has changed or `inputs` are of other names and shapes."""
    known = _traced.get(model)
    if known is None or _changed(model, known.graph):
        return None
    return known.graph if inputs is None or repr(blank(dict(inputs))) == repr(known.inputs) else None


def names_traced(model: nn.Module) -> frozenset[str] | None:
    """Names of the inputs that `model` was traced with, None where it never was."""
    known = _traced.get(model)
    return None if known is None else frozenset(name for name, value in known.inputs.items() if value is not None)


def inputs_like(model: nn.Module) -> dict[str, Any] | None:
    """Random inputs of the shapes that `model` was traced with, None where it never was."""
    known = _traced.get(model)
    if known is None:
        return None
    device = next(model.parameters()).device
    made: dict[str, Any] = fill(known.inputs, device, torch.Generator("cpu").manual_seed(0))
    return made


def _changed(model: nn.Module, graph: BlockGraph) -> bool:
    modules = dict(model.named_modules())
    return any(
        not isinstance(found := modules.get(stack), nn.ModuleList) or len(found) != len(blocks)
        for stack, blocks in graph.stacks.items()
    )
