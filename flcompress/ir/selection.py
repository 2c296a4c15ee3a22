"""The choice of the blocks to remove, a prune set, from a scored graph."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal

from flcompress.errors import PreconditionError
from flcompress.ir.block import Block, Estimate
from flcompress.ir.graph import BlockGraph

By = Literal["importance", "joint", "temporal-attention", "random", "middle"]
"""How blocks are chosen: the least important, the set that a `select` pass found, those of the lowest temporal
attention, random ones, or the middle.
"""


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
        graph: graph of the unpruned transformer, with the scores that `by` ranks.
        share: share of the model's parameters to remove, in (0, 1).
        by: "importance" takes the least important first (FastLightGen, Stage I); "temporal-attention" those that attend
            least to other frames (after F3-Pruning, Su et al. 2024); "random" and "middle" (the blocks nearest the
            middle of the depth) are what that choice is compared with.
        seed: seed of "random".
        among: choose only from these paths; all blocks where None.
        selected: the set that "joint" takes as it is.

    Raises:
        PreconditionError: the graph lacks the scores, or the blocks that may go do not hold the share.
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
    if by in ("importance", "temporal-attention"):
        scores = {block.path: score_of(block, by) for block in blocks}
        means = {path: score.mean for path, score in scores.items() if score is not None}
        unscored = [path for path in scores if path not in means]
        # Blocks that see the text alone attend to no frame, so they have no temporal attention, and stay.
        if unscored and (by == "importance" or not means):
            raise PreconditionError(f"{unscored[0]}: has no {by.replace('-', ' ')}; put the {by} pass before")
        blocks = sorted((block for block in blocks if block.path in means), key=lambda block: means[block.path])
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


def score_of(block: Block, by: By) -> Estimate | None:
    """Return the score that a choice ranks, the lowest first; None if the block, or the choice, has none."""
    return {"importance": block.importance, "temporal-attention": block.temporal_attention}.get(by)


def u_index(importance: list[float]) -> float | None:
    """Mean importance of the first and last quarter of the depth over that of the middle half; above 1 is a U-shape.

    None if there is no middle (fewer than three blocks), or if its mean is 0.
    """
    quarter = max(1, len(importance) // 4)
    outer = importance[:quarter] + importance[-quarter:]
    inner = importance[quarter:-quarter]
    return (sum(outer) / len(outer)) / (sum(inner) / len(inner)) if inner and sum(inner) else None
