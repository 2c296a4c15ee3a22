"""Sources of the smaller model's tensors: a tensor of the model each, or rows of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

ORDERS = 64
"""Most orders of chunks that are tried for the modulation of a block that becomes another kind."""

Indices = frozenset[int]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks of a tensor's rows, such as the scale and the shift among the six outputs of a modulation.

    Attributes:
        name: name of the tensor in the larger model.
        count: number of equal chunks of its first axis.
        order: indices of the chunks that the new tensor concatenates.
    """

    name: str
    count: int
    order: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the new tensor."""
        chunks = tensor.chunk(self.count)
        return torch.cat([chunks[index] for index in self.order])


TensorSource = str | Chunks
"""Name of a tensor of the larger model, or chunks of one."""

Sources = Mapping[str, TensorSource]
"""{tensor of the smaller model: its source}."""


def reindex(names: Iterable[str], removed: Mapping[str, Indices]) -> dict[str, str]:
    """Return {new name: name} of the tensors outside removed entries; later entries move up to close the gaps."""
    sources: dict[str, str] = {}
    for name in names:
        stack = next((candidate for candidate in removed if name.startswith(f"{candidate}.")), None)
        if stack is None:
            sources[name] = name
            continue
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(index) not in removed[stack]:
            new_index = int(index) - sum(earlier < int(index) for earlier in removed[stack])
            sources[f"{stack}.{new_index}.{rest}"] = name
    return sources


def state_from(state: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """Return the smaller model's state dict, from the larger one's."""
    return {
        name: state[source] if isinstance(source, str) else source.of(state[source.name])
        for name, source in sources.items()
    }


def misfit(shapes: Shapes, original_names: Mapping[str, str], expected: Shapes) -> str:
    """Return how the tensors differ from those that the smaller model expects; "" if they do not."""
    unknown, missing = sorted(set(original_names) - set(expected)), sorted(set(expected) - set(original_names))
    wrong = sorted(
        name for name in set(original_names) & set(expected) if shapes[original_names[name]] != expected[name]
    )
    for names, fault in (
        (missing, "needs weights that the model lacks"),
        (unknown, "has no place for weights"),
        (wrong, "expects another shape for weights"),
    ):
        if names:
            return f"rebuilt from its config, the smaller model {fault}: '{names[0]}' ({len(names)} in all)"
    return ""


def conversions(
    shapes: Shapes, original_names: Mapping[str, str], expected: Shapes, stacks: Iterable[str]
) -> Iterator[dict[str, TensorSource]]:
    """Yield ways to convert kept blocks into the kind that the smaller model has at their index: guesses, for a proof.

    An example is the new last block, which has no text branch (SD3, Mochi): superfluous tensors are dropped, and a
    modulation with fewer outputs is cut out of that of the same part, in any order.
    """
    spare = [name for name in original_names if name not in expected or shapes[original_names[name]] != expected[name]]
    lacking = [
        name for name in expected if name not in original_names or shapes[original_names[name]] != expected[name]
    ]
    inside = tuple(f"{stack}." for stack in stacks)
    if not spare or not all(name.startswith(inside) for name in [*spare, *lacking]):
        return
    plain = {name: old for name, old in original_names.items() if name in expected and name not in spare}
    pairs: dict[str, str] = {}
    ratios: set[tuple[int, int]] = set()
    for name in lacking:
        same_part = [spare_name for spare_name in spare if _part(spare_name) == _part(name)]
        matches = [match for match in same_part if _is_cut(expected[name], shapes[original_names[match]])]
        if len(matches) != 1:
            return
        pairs[name] = original_names[matches[0]]
        new, old = expected[name][0], shapes[pairs[name]][0]
        ratios.add((old // math.gcd(old, new), new // math.gcd(old, new)))
    if not ratios:
        yield dict(plain)
    elif len(ratios) == 1:
        for count, order in _orders(*ratios.pop()):
            if all(shapes[old][0] % count == 0 for old in pairs.values()):
                yield plain | {name: Chunks(old, count, order) for name, old in pairs.items()}


def _part(name: str) -> tuple[str, str]:
    """Return the part of a block that a tensor's layer belongs to, and the tensor's role: norm1_context, weight."""
    layer, _, what = name.rpartition(".")
    return layer.rpartition(".")[0], what


def _is_cut(new: tuple[int, ...], old: tuple[int, ...]) -> bool:
    return bool(new) and len(new) == len(old) and new[1:] == old[1:] and 0 < new[0] < old[0]


def _orders(count: int, chosen: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield (number of chunks, chosen ones), first chunks first: whole, then halved, for a scale and a shift."""
    for parts in (1, 2):
        if math.perm(count * parts, chosen * parts) <= ORDERS:
            orders = permutations(range(count * parts), chosen * parts)
            for order in sorted(orders, key=lambda order: (max(order), order)):
                yield count * parts, order
