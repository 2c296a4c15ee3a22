"""Ways to make the smaller model. They are guesses: only one that a proof confirms is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from flcompress.ir.graph import BlockGraph
from flcompress.tracing.removal.cuts import Cut, input_cuts
from flcompress.tracing.removal.rebuild import companions, rebuilt
from flcompress.tracing.removal.repairs import (
    Changes,
    Indices,
    counts_blocks,
    list_repairs,
    lost_entries,
    lowered,
    number_repairs,
)
from flcompress.tracing.removal.sources import Chunks, Source, conversions, misfit, reindexed


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to make the smaller model.

    Attributes:
        changes: of the config.
        built: the model of the changed config, whose weights are to be filled in.
        kept: {tensor of `built`: name in the model} of what is left without the removed entries; it need not fit.
        sources: the same, made to fit.
        cuts: entries that the arguments of the forward lose.
    """

    changes: Changes
    built: nn.Module
    kept: Mapping[str, str]
    sources: Mapping[str, Source]
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    @property
    def chunked(self) -> dict[str, Chunks]:
        """The tensors that are made of chunks of one."""
        return {name: source for name, source in self.sources.items() if isinstance(source, Chunks)}

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of kept blocks that the smaller model has no place for."""
        used = {source if isinstance(source, str) else source.name for source in self.sources.values()}
        return tuple(name for name in self.kept.values() if name not in used)


class Candidates:
    """The ways to remove entries of a model's stacks; configs that were built once are kept."""

    def __init__(self, model: nn.Module, graph: BlockGraph, inputs: Mapping[str, Any]) -> None:
        self._model, self._graph, self._inputs = model, graph, inputs
        self._shapes = _shapes(model)
        self._built: dict[str, nn.Module | str] = {}  # by the config changes

    def without(self, removed: Mapping[str, Indices]) -> Iterator[Candidate | str]:
        """Ways to do without the removed entries, the plainest first; a sentence for one whose weights do not fit."""
        model, graph = self._model, self._graph
        config: Any = model.config
        counts = lowered(config, graph, removed)
        ways = companions(model, graph, removed)
        tried = [*self._tries(counts, ways)]
        yield from map(self._fitting, tried)
        fits = any(isinstance(self._fitting(one), Candidate) for one in tried)
        for repair in list_repairs(model, graph, removed):
            tried += (more := [*self._tries(counts | repair, ways)])
            yield from map(self._fitting, more)
        for key, value in number_repairs(model, graph, removed):
            if counts_blocks(key) or not fits:
                yield from map(self._fitting, self._tries(counts | {key: value}, ways))
        whole = [one for one in tried if isinstance(one, Candidate)]
        for one in whole:
            yield from self._converted(one)
        lost = lost_entries(model, graph, removed)
        for one in filter(lambda one: isinstance(self._fitting(one), Candidate), whole):
            yield from (replace(one, cuts=cuts) for cuts in input_cuts(self._inputs, lost))

    def _tries(self, changes: Changes, ways: list[dict[str, Indices]]) -> Iterator[Candidate | str]:
        """The model of a changed config, with the weights that each way leaves; a sentence where there is none."""
        key = repr(sorted(changes.items()))
        if key not in self._built:
            self._built[key] = rebuilt(self._model, changes)
        built = self._built[key]
        if isinstance(built, str):
            yield built
            return
        for gone in ways:
            kept = reindexed(self._shapes, gone)
            yield Candidate(changes=changes, built=built, kept=kept, sources=kept)

    def _fitting(self, one: Candidate | str) -> Candidate | str:
        """The candidate whose weights fit, or why they do not."""
        return one if isinstance(one, str) else misfit(self._shapes, one.kept, _shapes(one.built)) or one

    def _converted(self, one: Candidate) -> Iterator[Candidate]:
        """A candidate whose weights do not fit, with those of kept blocks cut to the kind they become."""
        for sources in conversions(self._shapes, one.kept, _shapes(one.built), self._graph.stacks):
            yield replace(one, sources=sources)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
