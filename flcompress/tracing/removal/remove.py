"""Remove blocks by translation validation: accepted only if stock diffusers reproduces the skip exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flcompress.errors import NotRemovable, RequestError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.tracing.config_keys import has_config
from flcompress.tracing.graph_memo import keep, recall
from flcompress.tracing.removal.candidates import Candidate
from flcompress.tracing.removal.cuts import Cut, cut_inputs
from flcompress.tracing.removal.proof import Prover
from flcompress.tracing.removal.sources import Chunks, Indices
from flcompress.tracing.skip import require_blocks
from flcompress.tracing.tracer import inputs_for, trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Record of a removal: the blocks, the config changes, and the comparison of the reloaded model with the skip.

    If a kept block becomes another kind, such as the last of SD3, `chunked` tells which tensors of the smaller model
    are rows of the model's, and `dropped` which of the model's tensors have no counterpart. If an argument of the
    forward has an entry per block, `input_cuts` tells which entries the smaller model's argument lacks.
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
        """Convert arguments of the model's forward to those of the smaller model."""
        return cut_inputs(inputs, self.input_cuts)


def remove(model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a new model of the same class without the blocks at `paths`; `model` is not changed.

    It is loaded by stock diffusers from a folder saved without the blocks, and carries `flcompress_certificate`. The
    removal needs room for one saved copy in the temporary folder and two more copies of the model in memory.

    Args:
        model: a diffusers transformer with weights.
        paths: paths of the blocks.
        inputs: keyword arguments to check with; include every optional one that will be used.

    Raises:
        RequestError: an unknown path, no path, every block, or a model without weights or config.
        NotRemovable: the result would differ from skipping; names the block and the cause.
    """
    name, inputs = _check(model, inputs)
    graph = recall(model, inputs) or trace(model, inputs)
    wanted = require_blocks(graph, paths)
    needs_streams([graph.block(path) for path in wanted])
    graph.without(wanted)  # refuses to leave nothing
    with torch.random.fork_rng(devices=[]):
        prover = Prover(model, graph, inputs)
        candidate = _prove(prover, graph, wanted)
        result: Any = prover.smaller(wanted, candidate)
    if isinstance(result, str):
        raise NotRemovable(f"{_quote(wanted)} of {name} cannot be removed: {result}")
    config: Any = model.config
    result.train(model.training)
    result.register_to_config(_name_or_path=config.get("_name_or_path", ""))  # not the temporary folder
    result.flcompress_certificate = Certificate(
        model_class=name,
        removed=wanted,
        kept=graph.renamed(wanted),
        config_changes={key: (config[key], value) for key, value in candidate.changes.items()},
        inputs=tuple(inputs),
        max_abs_difference=0.0,
        random_max_abs_difference=0.0,
        diffusers_version=_diffusers_version(),
        chunked=candidate.chunked,
        dropped=candidate.unused,
        input_cuts=candidate.cuts,
    )
    smaller: nn.Module = result
    if candidate.unused or candidate.chunked or candidate.cuts:
        trace(smaller, cut_inputs(inputs, candidate.cuts))  # kept blocks of another size, or other arguments
    else:
        keep(smaller, inputs, graph.without(wanted))
    return smaller


def certify(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    graph: BlockGraph | None = None,
    paths: Iterable[str] | None = None,
) -> BlockGraph:
    """Return the graph with `removable` decided for the blocks at `paths` (by default all), and reasons for False.

    Each block is tried alone, on random weights, as in the first step of `remove`.

    Raises:
        RequestError: a model without weights or config.
    """
    _, inputs = _check(model, inputs)
    graph = graph or recall(model, inputs) or trace(model, inputs)
    prover = Prover(model, graph, inputs)
    targets = [graph.block(path) for path in paths] if paths is not None else graph.blocks
    blocks = []
    with torch.random.fork_rng(devices=[]):
        for block in targets:
            try:
                _prove(prover, graph, (block.path,))
            except NotRemovable as error:
                blocks.append(replace(block, removable=False, reason=str(error)))
            else:
                blocks.append(replace(block, removable=True))
    return graph.with_blocks(blocks)


def _check(model: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    name = type(model).__name__
    if not has_config(model) or not hasattr(model, "save_pretrained"):
        raise RequestError(f"{name} is no diffusers model; expected one with from_config and save_pretrained")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RequestError(f"{name} is on the meta device and has no weights to keep; load its weights first")
    return name, inputs_for(model, inputs)


def _prove(prover: Prover, graph: BlockGraph, wanted: tuple[str, ...]) -> Candidate:
    """Return the candidate that removes `wanted`; NotRemovable names the cause, and a block that must go with it."""
    needs_streams([graph.block(path) for path in wanted])
    removed = removed_indices(graph, wanted)
    result = prover.candidate_for(wanted, removed)
    if not isinstance(result, str):
        return result
    stack = graph.block(wanted[0]).stack
    alone = len(removed) == 1 and list(graph.config_keys.values()).count(graph.config_keys[stack]) == 1
    partner = prover.partner(wanted, stack) if alone else ""
    if partner:
        result += f"; it can go together with '{partner}': ask for both"
    raise NotRemovable(f"{_quote(wanted)} of {graph.model_class} cannot be removed: {result}")


def _quote(paths: tuple[str, ...]) -> str:
    return ", ".join(f"'{path}'" for path in paths)


def _diffusers_version() -> str:
    import diffusers  # late: its import takes seconds

    return str(diffusers.__version__)


def removed_indices(graph: BlockGraph, paths: tuple[str, ...]) -> dict[str, Indices]:
    """Return {stack: removed indices}; NotRemovable if the config keys that count the stacks do not allow them."""
    removed: dict[str, set[int]] = {}
    for path in paths:
        removed.setdefault(graph.block(path).stack, set()).add(graph.block(path).index)
    for stack, indices in removed.items():
        key = graph.config_keys.get(stack)
        if key is None:
            raise NotRemovable(
                f"'{stack}.{min(indices)}' cannot be removed: no config key of {graph.model_class} counts '{stack}'"
            )
        together = [other for other in graph.stacks if graph.config_keys.get(other) == key]
        if any(len(removed.get(other, ())) != len(indices) for other in together):
            wanted = max((removed.get(other, set()) for other in together), key=len)
            suggestion = [f"'{other}.{index}'" for other in together for index in sorted(wanted)]
            raise NotRemovable(
                f"'{stack}.{min(indices)}' cannot be removed alone: config key '{key}' counts "
                f"{' and '.join(repr(other) for other in together)}, which go only together; "
                f"ask for as many of each, such as {', '.join(suggestion)}"
            )
    return {stack: frozenset(indices) for stack, indices in removed.items()}


def needs_streams(blocks: list[Block]) -> None:
    """Raise NotRemovable for the first block without a residual stream."""
    for block in blocks:
        if not block.streams:
            reason = block.reason or "it carries no residual stream"
            raise NotRemovable(f"'{block.path}' cannot be removed: {reason}")
