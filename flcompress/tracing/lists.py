"""The blocks of a model that cannot be run: the lists of modules that its configuration counts."""

from __future__ import annotations

from torch import nn

from flcompress.errors import RequestError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.tracing.config_keys import count_keys

NOT_RUN = "not traced: its streams are not known"


def listed_blocks(model: nn.Module) -> BlockGraph:
    """Blocks with their parameters, but without streams, edges and FLOPs (0): what the structure alone tells.

    Raises:
        RequestError: no list of modules is counted by an integer of the configuration.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    keys = count_keys(model, lists)
    stacks: list[str] = []
    for name in (one for one in lists if one in keys):  # parents come before their children
        if not name.startswith(tuple(f"{outer}." for outer in stacks)):
            stacks.append(name)
    if not stacks:
        raise RequestError(f"{type(model).__name__}: no list of blocks is counted by its configuration")
    return BlockGraph(
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=0,
        blocks=[
            Block(
                path=f"{stack}.{index}",
                stack=stack,
                index=index,
                kind=type(module).__name__,
                streams=(),
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                flops=0,
                outputs=0,
                reason=NOT_RUN,
            )
            for stack in stacks
            for index, module in enumerate(lists[stack])
        ],
        flows={},
        config_keys={stack: keys[stack] for stack in stacks},
    )
