"""Candidates of the smaller model: configs and weights. They are guesses, of which a proof accepts one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations
from typing import Any

from torch import nn

from flcompress.ir.graph import BlockGraph
from flcompress.models.configs import BUILD_ERRORS
from flcompress.tracing.call import first_line
from flcompress.tracing.config_keys import COUNTING_WORDS, build, followers, list_lengths
from flcompress.tracing.removal.cuts import Cut, Lost, input_cuts
from flcompress.tracing.removal.sources import Chunks, Indices, TensorSource, conversions, misfit, reindex

Changes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate of the smaller model.

    Attributes:
        changes: changes of the config.
        model: the weightless model of the changed config.
        original_names: {tensor of `model`: its name in the larger model}, by renumbering alone; shapes need not fit.
        sources: the sources of the tensors of `model`, whose shapes fit.
        cuts: entries that arguments of the forward lose.
    """

    changes: Changes
    model: nn.Module
    original_names: Mapping[str, str]
    sources: Mapping[str, TensorSource]
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    @property
    def chunked(self) -> dict[str, Chunks]:
        """Tensors that consist of chunks of another."""
        return {name: source for name, source in self.sources.items() if isinstance(source, Chunks)}

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of kept blocks that the smaller model lacks."""
        used = {source if isinstance(source, str) else source.name for source in self.sources.values()}
        return tuple(name for name in self.original_names.values() if name not in used)


class Candidates:
    """Enumerates candidates for a removal; every config is built once."""

    def __init__(self, model: nn.Module, graph: BlockGraph, inputs: Mapping[str, Any]) -> None:
        self._model, self._graph, self._inputs = model, graph, inputs
        self._shapes = _shapes(model)
        self._models: dict[str, nn.Module | str] = {}  # by the config changes

    def without(self, removed: Mapping[str, Indices]) -> Iterator[Candidate | str]:
        """Yield candidates without the removed entries, plainest first; a sentence for one whose weights do not fit."""
        model, graph = self._model, self._graph
        config: Any = model.config
        counts = lower_counts(config, graph, removed)
        ways = companions(model, graph, removed)
        attempts = [*self._attempts(counts, ways)]
        yield from map(self._check_fit, attempts)
        fits = any(isinstance(self._check_fit(candidate), Candidate) for candidate in attempts)
        for repair in list_repairs(model, graph, removed):
            attempts += (repaired := [*self._attempts(counts | repair, ways)])
            yield from map(self._check_fit, repaired)
        for key, value in number_repairs(model, graph, removed):
            if counts_blocks(key) or not fits:
                yield from map(self._check_fit, self._attempts(counts | {key: value}, ways))
        candidates = [candidate for candidate in attempts if isinstance(candidate, Candidate)]
        for candidate in candidates:
            yield from self._convert(candidate)
        lost = lost_entries(model, graph, removed)
        for candidate in filter(lambda candidate: isinstance(self._check_fit(candidate), Candidate), candidates):
            yield from (replace(candidate, cuts=cuts) for cuts in input_cuts(self._inputs, lost))

    def _attempts(self, changes: Changes, ways: list[dict[str, Indices]]) -> Iterator[Candidate | str]:
        """Yield the model of a changed config with the weights of each way; a sentence if it cannot be built."""
        key = repr(sorted(changes.items()))
        if key not in self._models:
            self._models[key] = rebuild(self._model, changes)
        model = self._models[key]
        if isinstance(model, str):
            yield model
            return
        for way in ways:
            names = reindex(self._shapes, way)
            yield Candidate(changes=changes, model=model, original_names=names, sources=names)

    def _check_fit(self, candidate: Candidate | str) -> Candidate | str:
        """Return the candidate if its weights fit, else the reason why they do not."""
        if isinstance(candidate, str):
            return candidate
        return misfit(self._shapes, candidate.original_names, _shapes(candidate.model)) or candidate

    def _convert(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield variants of a candidate whose weights do not fit, converting kept blocks to the kind they become."""
        for sources in conversions(
            self._shapes, candidate.original_names, _shapes(candidate.model), self._graph.stacks
        ):
            yield replace(candidate, sources=sources)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def companions(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> list[dict[str, Indices]]:
    """Return the ways to extend `removed` to other lists that the same config keys count.

    In a list as long as the stack the same indices go. A longer list may have an entry for every block of several
    stacks, so that every offset is tried.
    """
    lengths = list_lengths(model)
    starts = dict(zip(graph.stacks, accumulate(map(len, graph.stacks.values()), initial=0), strict=False))
    ways: list[dict[str, Indices]] = [dict(removed)]
    for stack, indices in removed.items():
        depth = lengths[stack]
        for name in sorted(followers(model, graph.config_keys[stack])):
            inside = any(name.startswith(f"{other}.") for other in graph.stacks)
            if inside or name in graph.stacks or lengths[name] < depth:
                continue
            offsets = sorted(range(lengths[name] - depth + 1), key=lambda offset: offset != starts[stack])
            ways = [
                {**way, name: way.get(name, frozenset()) | {offset + index for index in indices}}
                for way in ways
                for offset in offsets
            ]
    return ways


def rebuild(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module | str:
    """Return a weightless model of the changed config; a sentence if the class refuses it."""
    try:
        return build(model, changes)
    except BUILD_ERRORS as error:
        return f"the smaller config is refused with {type(error).__name__}: {first_line(error)}"


def lower_counts(config: Mapping[str, Any], graph: BlockGraph, removed: Mapping[str, Indices]) -> Changes:
    """Return the config keys that count the stacks, lowered by the removal; lists lose the removed entries."""
    changes: Changes = {}
    for stack, indices in removed.items():
        value = config[graph.config_keys[stack]]
        changes[graph.config_keys[stack]] = value - len(indices) if type(value) is int else _without(value, indices)
    return changes


def list_repairs(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[Changes]:
    """Yield changes of lists of settings (one entry per block) and of block indices: single lists, then several."""
    singles: list[Changes] = [{key: value} for key, value in _without_entries(model, graph, removed).items()]
    modes = [_renumber(model, graph, removed, gap) for gap in (None, -1, 1)]
    singles += [{key: value} for mode in modes for key, value in mode.items()]
    config: Any = model.config
    configs: list[Changes] = [{**config, **lower_counts(config, graph, removed)}]
    several = [first | second for first, second in combinations(singles, 2)]
    together = [{key: value for repair in singles for key, value in repair.items()}]
    for repair in [*singles, *several, *together]:
        if {**configs[0], **repair} not in configs:
            configs.append({**configs[0], **repair})
            yield repair


def number_repairs(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[tuple[str, int]]:
    """Yield other integers that may have to fall with the depth, such as the number of leading blocks of another kind.

    Nearest values come first.
    """
    config: Any = model.config
    deepest = max(len(graph.stacks[stack]) for stack in removed)
    counts = set(lower_counts(config, graph, removed))
    keys = [key for key, value in config.items() if type(value) is int and 1 < value <= deepest and key not in counts]
    for step in range(1, deepest):
        for key in keys:
            if config[key] - step >= 1:
                yield key, config[key] - step


def counts_blocks(key: str) -> bool:
    """Return whether a config key's name suggests a count of blocks; others are tried only if no candidate fits."""
    return any(word in key for word in COUNTING_WORDS)


def lost_entries(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> list[Lost]:
    """Return everything that loses entries: stacks, runs of stacks, and lists of block indices."""
    config: Any = model.config
    lost = list(_runs(graph, removed))
    for stack, indices in removed.items():
        for value in _index_lists(config, len(graph.stacks[stack])).values():
            lost.append((len(value), tuple(position for position, item in enumerate(value) if item in indices)))
    return [(length, positions) for length, positions in lost if positions]


def _runs(graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[Lost]:
    stacks = graph.stacks
    for first in range(len(stacks)):
        for last in range(first, len(stacks)):
            run = list(stacks)[first : last + 1]
            if set(run) & set(removed):
                yield sum(len(stacks[stack]) for stack in run), tuple(sorted(_positions(run, stacks, removed)))


def _without_entries(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Changes:
    """Return lists of settings, as long as a stack or a run of stacks, without the entries of removed blocks."""
    config: Any = model.config
    counts = lower_counts(config, graph, removed)
    changes: Changes = {}
    for key, value in config.items():
        # A list that the config omits is made by the constructor, often from the index of each block.
        values = value if value is not None else vars(model).get(key)
        if not isinstance(values, list | tuple) or key.startswith("_") or key in counts:
            continue
        for length, positions in _runs(graph, removed):
            if len(values) == length:
                changes.setdefault(key, _without(values, positions))
    return changes


def _without(values: Any, positions: Iterable[int]) -> Any:
    removed = set(positions)
    return type(values)(item for position, item in enumerate(values) if position not in removed)


def _positions(run: Sequence[str], stacks: Mapping[str, Sequence[Any]], removed: Mapping[str, Indices]) -> Indices:
    before = 0
    positions: set[int] = set()
    for stack in run:
        positions |= {before + index for index in removed.get(stack, ())}
        before += len(stacks[stack])
    return frozenset(positions)


def _renumber(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices], gap: int | None) -> Changes:
    """Return renumbered lists of block indices, in ascending order.

    The index of a removed block is dropped (`gap` None), or moves to the block before (-1) or after (1) it: the model's
    action at that depth need not be a part of the block.
    """
    config: Any = model.config
    changes: Changes = {}
    for stack, indices in removed.items():
        depth = len(graph.stacks[stack])
        new = {old: position for position, old in enumerate(index for index in range(depth) if index not in indices)}
        for key, numbers in _index_lists({**config, **lower_counts(config, graph, removed)}, depth).items():
            moved = []
            for number in numbers:
                item = number
                while gap is not None and item in indices:
                    item += gap
                if item in new:
                    moved.append(new[item])
                elif gap is not None:
                    break
            else:
                if sorted(set(moved)) == moved:
                    changes[key] = type(config[key])(moved)
    return changes


def _index_lists(config: Mapping[str, Any], depth: int) -> dict[str, list[int]]:
    """Return the settings that are ascending lists of block indices of a stack."""
    lists: dict[str, list[int]] = {}
    for key, value in config.items():
        if isinstance(value, list | tuple) and not key.startswith("_"):
            numbers = [item for item in value if type(item) is int and 0 <= item < depth]
            if numbers == list(value) and sorted(set(numbers)) == numbers:
                lists[key] = numbers
    return lists
