"""Read what blocks hand on of a clip in a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.models.families.family import Family


def clip_blocks(family: Family, graph: BlockGraph) -> tuple[str, ...]:
    """Return the paths of the blocks that see the clip, in execution order."""
    return tuple(block.path for block in graph.blocks if block.stack not in family.text_stacks)


@contextmanager
def clip_features(model: nn.Module, graph: BlockGraph, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that a forward inside fills: path -> the clip's tokens [n, tokens, channels] after that block.

    Args:
        model: a stock transformer, wrapped or not by an engine.
        graph: its blocks.
        paths: those that are read.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str, index: int, module: nn.Module, args: Any, output: Any) -> None:
        features[path] = output[index] if isinstance(output, tuple | list) else output

    with ExitStack() as hooks:
        for path in paths:
            hook = partial(keep, path, _clip_output(graph.block(path)))
            hooks.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield features


def _clip_output(block: Block) -> int:
    """Return which output of a block holds the clip's tokens: diffusers' blocks take them as `hidden_states`."""
    return next((stream.output for stream in block.streams if stream.input == "hidden_states"), 0)
