"""Ways to make the smaller model. They are guesses: only one that a proof confirms is used."""

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
from flcompress.tracing.removal.sources import Chunks, Indices, Source, conversions, misfit, reindexed

Changes = dict[str, Any]


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


def companions(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> list[dict[str, Indices]]:
    """`removed`, and what goes with it in other lists that the same config key counts; more than one way to say it.

    In a list as long as the stack that is the same index. A longer one may hold an entry for every block of several
    stacks, so that the place is not known.
    """
    lengths = list_lengths(model)
    starts = dict(zip(graph.stacks, accumulate((len(one) for one in graph.stacks.values()), initial=0), strict=False))
    ways: list[dict[str, Indices]] = [dict(removed)]
    for stack, indices in removed.items():
        depth = lengths[stack]
        for name in sorted(followers(model, graph.config_keys[stack])):
            inside = any(name.startswith(f"{one}.") for one in graph.stacks)
            if inside or name in graph.stacks or lengths[name] < depth:
                continue
            offsets = sorted(range(lengths[name] - depth + 1), key=lambda offset: offset != starts[stack])
            ways = [
                {**way, name: way.get(name, frozenset()) | {offset + index for index in indices}}
                for way in ways
                for offset in offsets
            ]
    return ways


def rebuilt(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module | str:
    """A weightless model of the changed config; a sentence where the class refuses it."""
    try:
        return build(model, changes)
    except BUILD_ERRORS as error:
        return f"the smaller config is refused with {type(error).__name__}: {first_line(error)}"


def lowered(config: Mapping[str, Any], graph: BlockGraph, removed: Mapping[str, Indices]) -> Changes:
    """The config keys that count the stacks, lowered by what is removed; of lists, without those entries."""
    changes: Changes = {}
    for stack, gone in removed.items():
        value = config[graph.config_keys[stack]]
        changes[graph.config_keys[stack]] = value - len(gone) if type(value) is int else _without(value, gone)
    return changes


def list_repairs(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[Changes]:
    """Changes of lists of settings (one entry a block) and of lists of block indices; one list first, then several."""
    singles: list[Changes] = [{key: value} for key, value in _without_entries(model, graph, removed).items()]
    modes = [_renumbered(model, graph, removed, gap) for gap in (None, -1, 1)]
    singles += [{key: value} for mode in modes for key, value in mode.items()]
    config: Any = model.config
    tried: list[Changes] = [{**config, **lowered(config, graph, removed)}]
    several = [one | two for one, two in combinations(singles, 2)]
    together = [{key: value for repair in singles for key, value in repair.items()}]
    for repair in [*singles, *several, *together]:
        if {**tried[0], **repair} not in tried:
            tried.append({**tried[0], **repair})
            yield repair


def number_repairs(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[tuple[str, int]]:
    """Other integers that may have to fall with the depth, such as the number of first blocks that are of another kind.

    Nearest values first.
    """
    config: Any = model.config
    deepest = max(len(graph.stacks[stack]) for stack in removed)
    counts = set(lowered(config, graph, removed))
    keys = [key for key, value in config.items() if type(value) is int and 1 < value <= deepest and key not in counts]
    for step in range(1, deepest):
        for key in keys:
            if config[key] - step >= 1:
                yield key, config[key] - step


def counts_blocks(key: str) -> bool:
    """Whether a config key by its name counts blocks; others are believed only where they alone make weights fit."""
    return any(word in key for word in COUNTING_WORDS)


def lost_entries(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> list[Lost]:
    """What loses entries: stacks, several of them in a row, and lists of indices that name removed blocks."""
    config: Any = model.config
    found = list(_runs(graph, removed))
    for stack, gone in removed.items():
        for value in _index_lists(config, len(graph.stacks[stack])).values():
            found.append((len(value), tuple(place for place, item in enumerate(value) if item in gone)))
    return [(length, places) for length, places in found if places]


def _runs(graph: BlockGraph, removed: Mapping[str, Indices]) -> Iterator[Lost]:
    stacks = graph.stacks
    for first in range(len(stacks)):
        for last in range(first, len(stacks)):
            run = list(stacks)[first : last + 1]
            if set(run) & set(removed):
                yield sum(len(stacks[stack]) for stack in run), tuple(sorted(_places(run, stacks, removed)))


def _without_entries(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices]) -> Changes:
    """Lists of settings, as long as a stack or as several in a row, without the entries of the removed blocks."""
    config: Any = model.config
    counts = lowered(config, graph, removed)
    found: Changes = {}
    for key, value in config.items():
        # A list that the config leaves out is made by the constructor, often from the index of each block.
        values = value if value is not None else vars(model).get(key)
        if not isinstance(values, list | tuple) or key.startswith("_") or key in counts:
            continue
        for length, gone in _runs(graph, removed):
            if len(values) == length:
                found.setdefault(key, _without(values, gone))
    return found


def _without(values: Any, gone: Iterable[int]) -> Any:
    left_out = set(gone)
    return type(values)(item for place, item in enumerate(values) if place not in left_out)


def _places(run: Sequence[str], stacks: Mapping[str, Sequence[Any]], removed: Mapping[str, Indices]) -> Indices:
    before = 0
    places: set[int] = set()
    for stack in run:
        places |= {before + index for index in removed.get(stack, ())}
        before += len(stacks[stack])
    return frozenset(places)


def _renumbered(model: nn.Module, graph: BlockGraph, removed: Mapping[str, Indices], gap: int | None) -> Changes:
    """Lists of block indices, in ascending order, renumbered.

    An index of a removed block is dropped (`gap` None), or moves to the block before (-1) or after (1) it: what the
    model does at that place need not be a part of the block.
    """
    config: Any = model.config
    found: Changes = {}
    for stack, gone in removed.items():
        depth = len(graph.stacks[stack])
        new = {old: place for place, old in enumerate(index for index in range(depth) if index not in gone)}
        for key, numbers in _index_lists({**config, **lowered(config, graph, removed)}, depth).items():
            moved = []
            for number in numbers:
                item = number
                while gap is not None and item in gone:
                    item += gap
                if item in new:
                    moved.append(new[item])
                elif gap is not None:
                    break
            else:
                if sorted(set(moved)) == moved:
                    found[key] = type(config[key])(moved)
    return found


def _index_lists(config: Mapping[str, Any], depth: int) -> dict[str, list[int]]:
    """The settings that are lists of indices of a stack's blocks, in ascending order."""
    found: dict[str, list[int]] = {}
    for key, value in config.items():
        if isinstance(value, list | tuple) and not key.startswith("_"):
            numbers = [item for item in value if type(item) is int and 0 <= item < depth]
            if numbers == list(value) and sorted(set(numbers)) == numbers:
                found[key] = numbers
    return found
