"""The smaller model: which weights it must have for the kept blocks to stay what they are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from flcompress.errors import NotRemovable
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.models.configs import BUILD_ERRORS
from flcompress.tracing.call import first_line
from flcompress.tracing.config_keys import build, followers, list_lengths
from flcompress.tracing.removal.repairs import Indices


def removed_indices(graph: BlockGraph, paths: tuple[str, ...]) -> dict[str, Indices]:
    """{stack: removed indices}, checked against the config keys that count the stacks; raises NotRemovable."""
    removed: dict[str, set[int]] = {}
    for path in paths:
        removed.setdefault(graph.block(path).stack, set()).add(graph.block(path).index)
    for stack, indices in removed.items():
        key = graph.config_keys.get(stack)
        if key is None:
            raise NotRemovable(
                f"'{stack}.{min(indices)}' cannot be removed: no config key of {graph.model_class} counts '{stack}'"
            )
        together = [one for one in graph.stacks if graph.config_keys.get(one) == key]
        if any(len(removed.get(other, ())) != len(indices) for other in together):
            wanted = max((removed.get(one, set()) for one in together), key=len)
            whole = [f"'{one}.{index}'" for one in together for index in sorted(wanted)]
            raise NotRemovable(
                f"'{stack}.{min(indices)}' cannot be removed alone: config key '{key}' counts "
                f"{' and '.join(repr(one) for one in together)}, which go only together; "
                f"ask for as many of each, such as {', '.join(whole)}"
            )
    return {stack: frozenset(indices) for stack, indices in removed.items()}


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


def needs_streams(blocks: list[Block]) -> None:
    """Raise NotRemovable for the first block that carries nothing on."""
    for block in blocks:
        if not block.streams:
            reason = block.reason or "it carries no residual stream"
            raise NotRemovable(f"'{block.path}' cannot be removed: {reason}")
