"""The choice of the blocks to remove, a prune set, from a scored graph."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal

from flcompress.errors import PreconditionError
from flcompress.ir.graph import BlockGraph

By = Literal["importance", "joint", "random", "middle"]
"""How blocks are chosen: the least important, the set that a `select` pass found, random ones, or the middle."""


def choose(
    graph: BlockGraph,
    share: float,
    by: By,
    *,
    seed: int = 0,
    among: Collection[str] | None = None,
    selected: Collection[str] = (),
) -> tuple[str, ...]:
    """Blocks that together hold at least `share` of the model's parameters, in execution order.

    Args:
        graph: graph of the unpruned transformer; scored if `by` is "importance".
        share: share of the model's parameters to remove, in (0, 1).
        by: "importance" takes the least important first (FastLightGen, Stage I); "random" and "middle" (the blocks
            nearest the middle of the depth) are what that choice is compared with.
        seed: seed of "random".
        among: choose only from these paths; all blocks where None.
        selected: the set that "joint" takes as it is.

    Raises:
        PreconditionError: the graph is not scored, or the blocks that may go do not hold the share.
    """
    if by == "joint":
        held = sum(graph.block(path).parameters for path in selected) / graph.parameters
        if held < share:
            raise PreconditionError(
                f"remove: {share:g} of the parameters asked for; the selected set holds {held:.3f}; ask for as much in "
                "select.remove"
            )
        return tuple(block.path for block in graph.blocks if block.path in set(selected))
    blocks = [block for block in graph.blocks if block.removable is not False]
    if among is not None:
        blocks = [block for block in blocks if block.path in among]
    if by == "importance":
        unscored = [block.path for block in blocks if block.importance is None]
        if unscored:
            raise PreconditionError(f"{unscored[0]}: has no importance; put the importance pass before")
        blocks.sort(key=lambda block: block.importance.mean if block.importance else 0.0)
    elif by == "random":
        random.Random(seed).shuffle(blocks)
    else:
        order = [block.path for block in graph.blocks]
        middle = (len(order) - 1) / 2.0
        blocks.sort(key=lambda block: abs(order.index(block.path) - middle))
    chosen: set[str] = set()
    removed = 0
    for block in blocks:
        if removed >= share * graph.parameters:
            break
        chosen.add(block.path)
        removed += block.parameters
    if removed < share * graph.parameters or len(chosen) == len(graph.blocks):
        raise PreconditionError(
            f"remove: {share:g} of the parameters asked for; the blocks that may go hold "
            f"{sum(block.parameters for block in blocks) / graph.parameters:.3f} and one must stay; ask for less"
        )
    return tuple(block.path for block in graph.blocks if block.path in chosen)


def u_index(importance: list[float]) -> float | None:
    """Mean importance of the first and last quarter of the depth over that of the middle half; above 1 is a U-shape.

    None if there is no middle (fewer than three blocks), or if its mean is 0.
    """
    quarter = max(1, len(importance) // 4)
    outer = importance[:quarter] + importance[-quarter:]
    inner = importance[quarter:-quarter]
    return (sum(outer) / len(outer)) / (sum(inner) / len(inner)) if inner and sum(inner) else None
