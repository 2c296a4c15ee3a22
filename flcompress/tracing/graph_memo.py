"""Memo of traced graphs, each for as long as its model lives and the model's lists keep their lengths."""

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
class _Memo:
    graph: BlockGraph
    inputs: Any  # blanked


_memos: WeakKeyDictionary[nn.Module, _Memo] = WeakKeyDictionary()


def keep(model: nn.Module, inputs: Mapping[str, Any], graph: BlockGraph) -> None:
    """Remember the graph of `model`."""
    _memos[model] = _Memo(graph, blank(dict(inputs)))


def recall(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> BlockGraph | None:
    """Return the remembered graph; None if the model has changed or `inputs` have other names and shapes."""
    known = _memos.get(model)
    if known is None or _has_changed(model, known.graph):
        return None
    return known.graph if inputs is None or repr(blank(dict(inputs))) == repr(known.inputs) else None


def traced_input_names(model: nn.Module) -> frozenset[str] | None:
    """Return the names of the inputs that `model` was traced with; None if it never was."""
    known = _memos.get(model)
    return None if known is None else frozenset(name for name, value in known.inputs.items() if value is not None)


def inputs_like(model: nn.Module) -> dict[str, Any] | None:
    """Return random inputs of the shapes that `model` was traced with; None if it never was."""
    known = _memos.get(model)
    if known is None:
        return None
    device = next(model.parameters()).device
    inputs: dict[str, Any] = fill(known.inputs, device, torch.Generator("cpu").manual_seed(0))
    return inputs


def _has_changed(model: nn.Module, graph: BlockGraph) -> bool:
    modules = dict(model.named_modules())
    return any(
        not isinstance(module := modules.get(stack), nn.ModuleList) or len(module) != len(blocks)
        for stack, blocks in graph.stacks.items()
    )
