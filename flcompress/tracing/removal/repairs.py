"""Ways to write the smaller config. They are guesses: only one that a proof confirms is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import nn

from flcompress.ir.graph import BlockGraph
from flcompress.tracing.config_keys import COUNTING_WORDS
from flcompress.tracing.removal.cuts import Lost

Indices = frozenset[int]
Changes = dict[str, Any]


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
