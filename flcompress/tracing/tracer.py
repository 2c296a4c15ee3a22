"""Trace a module to its block graph, by running it with hooks; works on the meta device too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flcompress.errors import RequestError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.tracing.call import (
    FORWARD_ERRORS,
    Call,
    arguments_by_name,
    blank,
    evaluating,
    first_line,
)
from flcompress.tracing.config_keys import count_keys, list_keys
from flcompress.tracing.flows import flows_of
from flcompress.tracing.graph_memo import keep
from flcompress.tracing.replay import Layout, adopt_streams, layout_by_shape, layout_of, signature
from flcompress.tracing.running import Run, flop_counter, lacks_values, runs


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> BlockGraph:
    """Return the block graph of `model`, with the FLOPs of one sample.

    Args:
        model: a transformer; its weights may be on the meta device.
        inputs: keyword arguments of one forward, batch axis first; by default the family's example inputs.

    Raises:
        RequestError: no transformer, inputs it cannot run on, or no list of blocks.
    """
    _require_transformer(model)
    inputs = inputs_for(model, inputs)
    with evaluating(model), torch.random.fork_rng(devices=[]):
        run, calls, flops, layouts = _run_and_record(model, inputs)
        stacks, config_keys = _stacks(model, calls, layouts)
        if not stacks:
            layouts = _layouts_by_shape(model, calls, layouts)
            stacks, config_keys = _stacks(model, calls, layouts)
        order = [path for path in calls if path.rpartition(".")[0] in stacks]
        if not order:
            raise RequestError(
                f"{type(model).__name__} has no list of residual blocks that each run once; "
                "expected a transformer such as WanTransformer3DModel"
            )
        flows = flows_of(run, {path: layouts[path] for path in order})
    batch = _batch(inputs)
    graph = BlockGraph(
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=flops // batch,
        blocks=[_block(model, path, calls[path].flops // batch, layouts[path]) for path in order],
        flows=flows,
        config_keys=config_keys,
    )
    graph.verify()
    keep(model, inputs, graph)
    return graph


def _require_transformer(model: object) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise RequestError(f"{name} is no torch module; expected a transformer, such as a pipeline's .transformer")
    modules = [cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers.models.")]
    # The first home is the class's own: everything of diffusers also inherits from its mixins.
    if modules and not modules[0].startswith("diffusers.models.transformers."):
        raise RequestError(f"{name} is no transformer; only the classes of diffusers.models.transformers are handled")


def inputs_for(model: nn.Module, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `inputs`, or the example inputs of the model's family."""
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise RequestError(
                f"inputs of {type(model).__name__} are a {type(inputs).__name__}, expected the keyword arguments of "
                "one forward as a dict"
            )
        return dict(inputs)
    from flcompress.models.inputs import example_inputs  # late: it knows every family, and only few callers need it

    return dict(example_inputs(model))


def _batch(inputs: Mapping[str, Any]) -> int:
    hidden_states = inputs.get("hidden_states")
    return hidden_states.shape[0] if isinstance(hidden_states, Tensor) else 1


def _block(model: nn.Module, path: str, flops: int, layout: Layout) -> Block:
    module = model.get_submodule(path)
    stack, _, index = path.rpartition(".")
    return Block(
        path=path,
        stack=stack,
        index=int(index),
        kind=type(module).__name__,
        streams=layout.streams,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        flops=flops,
        outputs=layout.outputs,
        silent=layout.silent,
        removable=None if layout.streams else False,
        reason=layout.reason,
    )


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}.{index}", child) for index, child in enumerate(part))


def _run_and_record(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Run, dict[str, Call], int, dict[str, Layout]]:
    """Return the first way to run the model that works, the recorded calls, the FLOPs and the blocks' layouts."""
    for run in runs(model, inputs):
        try:
            calls, flops = _record(run)
            return run, calls, flops, _layouts(run.module, calls)
        except FORWARD_ERRORS as error:
            failure = error
            if not run.meta or not lacks_values(error):  # what does not fit here fits nowhere, and the CPU is slow
                break
    raise RequestError(
        f"{type(model).__name__} cannot run on the inputs {', '.join(inputs) or 'none'}: "
        f"{type(failure).__name__}: {first_line(failure)}; give the keyword arguments of one forward"
    ) from failure


def _record(run: Run) -> tuple[dict[str, Call], int]:
    """Return the calls of list entries that ran exactly once, in order of their start, and the total FLOPs."""
    started: dict[str, int] = {}
    calls: dict[str, Call | None] = {}
    counter = flop_counter()

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls[path] = None
            started[path] = counter.get_total_flops() if path not in started else -1

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if started[path] >= 0:
                spent = counter.get_total_flops() - started[path]
                calls[path] = Call(blank(args), blank(kwargs), blank(output), spent)

        return hook

    with ExitStack() as hooks:
        for path, child in _candidates(run.module):
            hooks.callback(child.register_forward_pre_hook(before(path)).remove)
            hooks.callback(child.register_forward_hook(after(path), with_kwargs=True).remove)
        with counter:
            run()
    return {path: call for path, call in calls.items() if call is not None}, counter.get_total_flops()


def _layouts(model: nn.Module, calls: Mapping[str, Call]) -> dict[str, Layout]:
    """Return the layout of every recorded child; children that are built and called alike are replayed once."""
    known: dict[str, Layout] = {}
    layouts: dict[str, Layout] = {}
    for path, call in calls.items():
        child = model.get_submodule(path)
        if not any(True for _ in child.parameters()):
            layouts[path] = Layout((), 0, "it has no parameters")  # a dropout or an activation, not a block
            continue
        key = signature(child, call)
        if key not in known:
            known[key] = layout_of(child, call)
        layouts[path] = known[key]
    for path, call in calls.items():
        stack = path.rpartition(".")[0]
        sibling = layouts.get(f"{stack}.0")
        if sibling is not None and not layouts[path].streams:
            inputs = arguments_by_name(model.get_submodule(path), call.args, call.kwargs)
            layouts[path] = adopt_streams(layouts[path], call, inputs, sibling)
    return layouts


def _layouts_by_shape(model: nn.Module, calls: Mapping[str, Call], layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Match the blocks of a model without residual blocks, the entries of the lists its config counts, by shape.

    DreamLite's variant without self-attention passes only the norm of its stream into a block.
    """
    lists = {name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    counted = count_keys(model, lists)
    matched = {path: replace(layout, streams=()) for path, layout in layouts.items()}
    for path, call in calls.items():
        if path.rpartition(".")[0] in counted:
            matched[path] = layout_by_shape(model.get_submodule(path), call, layouts[path])
    return matched


def _stacks(
    model: nn.Module, calls: Mapping[str, Call], layouts: Mapping[str, Layout]
) -> tuple[set[str], dict[str, str]]:
    """Return the lists of blocks and the config keys that count them.

    The children of a list of blocks each ran once, and at least one of them carries a stream; the outermost lists are
    kept. A list of length one must also be counted by a config key: it may be the rest of a removal, or just a wrapper.
    """
    lists: list[str] = []
    for name, part in model.named_modules():  # parents come before their children
        if isinstance(part, nn.ModuleList) and len(part):
            children = [f"{name}.{index}" for index in range(len(part))]
            if all(path in calls for path in children) and any(layouts[path].streams for path in children):
                lists.append(name)
    single = {name for name in lists if f"{name}.1" not in calls}
    outermost: list[str] = []
    for name in [name for name in lists if name not in single]:
        if not name.startswith(tuple(f"{outer}." for outer in outermost)):
            outermost.append(name)
    lone = {
        name
        for name in single
        if not any(f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.") for other in outermost)
    }
    keys = count_keys(model, [*outermost, *lone])
    keys |= list_keys(model, [name for name in [*outermost, *lone] if name not in keys])
    return {*outermost, *(name for name in lone if name in keys)}, keys
