"""Which tensor of a model each tensor of the smaller one is, or of which rows of one it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

ORDERS = 64
"""Choices of chunks up to which all are tried for the modulation of a block that becomes one of another kind."""

Indices = frozenset[int]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of a tensor's rows, such as the scale and the shift among the six outputs of a modulation.

    Attributes:
        name: of the tensor in the larger model.
        count: of equal chunks that its first axis is cut into.
        taken: which of them, in the order in which they make up the new tensor.
    """

    name: str
    count: int
    taken: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The new tensor."""
        chunks = tensor.chunk(self.count)
        return torch.cat([chunks[one] for one in self.taken])


Source = str | Chunks
"""A tensor of the larger model by its name, or chunks of one."""

Sources = Mapping[str, Source]
"""{tensor of the smaller model: where it comes from}."""


def reindexed(names: Iterable[str], removed: Mapping[str, Indices]) -> dict[str, str]:
    """{new name: name} of the tensors that are in no removed entry, the others moved up to close the gaps."""
    kept: dict[str, str] = {}
    for name in names:
        stack = next((one for one in removed if name.startswith(f"{one}.")), None)
        if stack is None:
            kept[name] = name
            continue
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(index) not in removed[stack]:
            place = int(index) - sum(one < int(index) for one in removed[stack])
            kept[f"{stack}.{place}.{rest}"] = name
    return kept


def drawn(state: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """The smaller model's state dict, from the larger one's."""
    return {
        name: state[source] if isinstance(source, str) else source.of(state[source.name])
        for name, source in sources.items()
    }


def misfit(shapes: Shapes, kept: Mapping[str, str], wanted: Shapes) -> str:
    """Why the tensors `kept` are not those that the smaller model wants; empty where they are."""
    unknown, missing = sorted(set(kept) - set(wanted)), sorted(set(wanted) - set(kept))
    wrong = sorted(name for name in set(kept) & set(wanted) if shapes[kept[name]] != wanted[name])
    for names, fault in (
        (missing, "needs weights that the model lacks"),
        (unknown, "has no place for weights"),
        (wrong, "expects another shape for weights"),
    ):
        if names:
            return f"rebuilt from its config, the smaller model {fault}: '{names[0]}' ({len(names)} in all)"
    return ""


def conversions(
    shapes: Shapes, kept: Mapping[str, str], wanted: Shapes, stacks: Iterable[str]
) -> Iterator[dict[str, Source]]:
    """Ways to make kept blocks into the kind that the smaller model has in their places.

    Such as its new last block, which has no text branch (SD3, Mochi): what is not wanted there goes, and a modulation
    that is wanted with fewer outputs is cut out of the one of the same part, in any order. Guesses, for a proof.
    """
    spare = [name for name in kept if name not in wanted or shapes[kept[name]] != wanted[name]]
    lacking = [name for name in wanted if name not in kept or shapes[kept[name]] != wanted[name]]
    inside = tuple(f"{stack}." for stack in stacks)
    if not spare or not all(name.startswith(inside) for name in [*spare, *lacking]):
        return
    plain = {name: old for name, old in kept.items() if name in wanted and name not in spare}
    pairs: dict[str, str] = {}
    ratios: set[tuple[int, int]] = set()
    for name in lacking:
        alike = [one for one in spare if _part(one) == _part(name) and _is_cut(wanted[name], shapes[kept[one]])]
        if len(alike) != 1:
            return
        pairs[name] = kept[alike[0]]
        new, old = wanted[name][0], shapes[pairs[name]][0]
        ratios.add((old // math.gcd(old, new), new // math.gcd(old, new)))
    if not ratios:
        yield dict(plain)
    elif len(ratios) == 1:
        for count, taken in _orders(*ratios.pop()):
            if all(shapes[old][0] % count == 0 for old in pairs.values()):
                yield plain | {name: Chunks(old, count, taken) for name, old in pairs.items()}


def _part(name: str) -> tuple[str, str]:
    """The part of a block that a tensor's layer belongs to, and what the tensor is there: norm1_context, weight."""
    layer, _, what = name.rpartition(".")
    return layer.rpartition(".")[0], what


def _is_cut(new: tuple[int, ...], old: tuple[int, ...]) -> bool:
    return bool(new) and len(new) == len(old) and new[1:] == old[1:] and 0 < new[0] < old[0]


def _orders(count: int, taken: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(chunks, those taken), the first ones first: whole chunks, then each as two, for a scale and a shift."""
    for parts in (1, 2):
        if math.perm(count * parts, taken * parts) <= ORDERS:
            for order in sorted(permutations(range(count * parts), taken * parts), key=lambda one: (max(one), one)):
                yield count * parts, order
