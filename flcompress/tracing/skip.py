"""Skip blocks: within a `with` block they act as identities on their residual streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from flcompress.diffusion.network import Conditioning, Network
from flcompress.errors import ModelError, NotRemovable, RequestError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.models.network import as_network, stock_model
from flcompress.tracing.call import arguments_by_name, positional_names
from flcompress.tracing.graph_memo import inputs_like, recall, traced_input_names
from flcompress.tracing.tracer import trace


@contextmanager
def skip(model: nn.Module, paths: Iterable[str], *, graph: BlockGraph | None = None) -> Iterator[None]:
    """Make each block in `paths` return its residual inputs, in the order and structure of its outputs.

    Gradients flow through the skipped blocks' streams, skips may be nested, and every forward is restored on exit.

    Args:
        model: the model.
        paths: paths of blocks.
        graph: the model's block graph; by default its last one, or that of a new trace.

    Raises:
        RequestError: an unknown path; in the forward, an input that the trace lacked and that could open a stream
            unknown to the graph.
        NotRemovable: a block that carries no stream.
    """
    known = graph if graph is not None else graph_of(model)
    blocks = [known.block(path) for path in known_paths(known, paths)]
    forwards = {block.path: Identity(model.get_submodule(block.path), block) for block in blocks}
    closed = next((block.path for block in blocks if len(block.streams) + len(block.silent) < block.outputs), None)
    names = traced_input_names(model) if closed else None
    with ExitStack() as stack:
        if closed and names is not None:
            hook = model.register_forward_pre_hook(_no_new_inputs(closed, names), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(replaced_forwards(model, forwards))
        yield


@contextmanager
def mute(model: nn.Module, paths: Iterable[str], *, graph: BlockGraph) -> Iterator[None]:
    """Skip blocks, yet compute them and multiply their addition by zero: h + 0 (f(h) - h).

    The output is that of `skip`, and their parameters get zero gradients, for engines that require every block to run.
    """
    blocks = [graph.block(path) for path in known_paths(graph, paths)]
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.path)
            hook = _without_addition(Identity(module, block))
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _without_addition(identity: Identity) -> Callable[..., Any]:
    def blend(unchanged: Any, computed: Any) -> Any:
        return None if unchanged is None else unchanged + 0.0 * (computed - unchanged)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        unchanged = identity(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return blend(unchanged, output)
        return tuple(blend(*pair) for pair in zip(unchanged, output, strict=True))

    return hook


def _no_new_inputs(path: str, names: frozenset[str]) -> Callable[..., None]:
    def hook(model: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = arguments_by_name(model, args, kwargs)
        tensors = {name for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        if tensors - names:
            raise RequestError(
                f"'{path}' cannot be skipped with input '{min(tensors - names)}': the model was traced without it, and "
                "a stream that it opens would be lost; call flcompress.trace(model, inputs) with it"
            )

    return hook


def known_paths(graph: BlockGraph, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct paths; RequestError on one that is no block."""
    wanted = [paths] if isinstance(paths, str) else paths
    return tuple(dict.fromkeys(graph.block(path).path for path in wanted))


def graph_of(model: nn.Module) -> BlockGraph:
    """Return the graph of the model's last trace; trace it if there was none or a list has changed its length."""
    graph, inputs = recall(model), inputs_like(model)
    try:
        return graph or trace(model, inputs)
    except ModelError as error:  # no example inputs for this class
        name = type(model).__name__
        raise RequestError(f"{name} was not traced; call flcompress.trace(model, inputs) once before") from error


class Identity:
    """A forward that returns the residual inputs; silent outputs are zero, and outputs that were None stay None."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        if not block.streams:
            raise NotRemovable(f"'{block.path}' cannot be skipped: {block.reason or 'it carries no residual stream'}")
        names = positional_names(type(module).forward)
        self._outputs = block.outputs
        self._streams = [
            (stream.output, stream.input, names.index(stream.input) if stream.input in names else stream.input)
            for stream in block.streams
        ]
        self._silent = block.silent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the streams among the arguments, in the structure of the block's outputs."""
        outputs: list[Any] = [None] * max(self._outputs, 1)
        for output, name, position in self._streams:
            outputs[output] = kwargs[name] if name in kwargs else args[int(position)]
        for output in self._silent:
            outputs[output] = torch.zeros_like(next(value for value in outputs if value is not None))
        return tuple(outputs) if self._outputs else outputs[0]


@contextmanager
def replaced_forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of the modules at the paths; hooks, parameters and the state dict are untouched."""
    modules = {path: model.get_submodule(path) for path in forwards}
    before = {path: vars(module).get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            vars(module)["forward"] = forwards[path]
        yield
    finally:
        for path, module in modules.items():
            old = before[path]
            if old is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = old


def require_blocks(graph: BlockGraph, paths: Iterable[str]) -> tuple[str, ...]:
    """Return `known_paths`; RequestError if there are none."""
    wanted = known_paths(graph, paths)
    if not wanted:
        raise RequestError(f"no block of {graph.model_class} was named; expected at least one path")
    return wanted


def skipping_network(
    transformer: torch.nn.Module,
    paths: Iterable[str],
    graph: BlockGraph | None = None,
    guidance: float | None = None,
    skip: Callable[..., AbstractContextManager[None]] = skip,
) -> Network:
    """Return the transformer as a network in which the blocks at `paths` are identities.

    Args:
        transformer: a stock model, or an engine's wrapper of one.
        paths: paths of the blocks.
        graph: its block graph; by default it is traced once.
        guidance: embedded guidance scale, for networks that take one.
        skip: `skip` or `mute`.
    """
    network, skipped, model = as_network(transformer, guidance), tuple(paths), stock_model(transformer)
    graph = graph or graph_of(model)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with skip(model, skipped, graph=graph):
            return network(x, timestep, conditioning)

    return call
