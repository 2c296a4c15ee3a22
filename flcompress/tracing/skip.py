"""Blocks that act as identities on their residual streams while a `with` block lasts."""

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
from flcompress.tracing.call import named, positional_names
from flcompress.tracing.traced import inputs_like, names_traced, recall
from flcompress.tracing.tracer import trace


@contextmanager
def skip(model: nn.Module, paths: Iterable[str], *, graph: BlockGraph | None = None) -> Iterator[None]:
    """While active, each block in `paths` returns its residual inputs, in the order and structure of its outputs.

    With `graph` nothing is traced; without it the model's last graph is used, or made. Gradients flow through the
    skipped blocks' streams, skips may be nested, and on leaving every forward is what it was. Raises RequestError on an
    unknown path, NotRemovable on a block that carries no stream, and (in the forward) RequestError where an input that
    the trace did not have could open a stream that the graph does not know.
    """
    known = graph if graph is not None else graph_of(model)
    blocks = [known.block(path) for path in known_paths(known, paths)]
    forwards = {block.path: Identity(model.get_submodule(block.path), block) for block in blocks}
    closed = next((block.path for block in blocks if len(block.streams) + len(block.silent) < block.outputs), None)
    names = names_traced(model) if closed else None
    with ExitStack() as stack:
        if closed and names is not None:
            hook = model.register_forward_pre_hook(_no_new_inputs(closed, names), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(replaced_forwards(model, forwards))
        yield


@contextmanager
def mute(model: nn.Module, paths: Iterable[str], *, graph: BlockGraph) -> Iterator[None]:
    """As `skip`, but the blocks are computed and what they add is multiplied by zero: h + 0 (f(h) - h).

    The output is the same and their parameters get gradients of zero. For engines that must meet every block.
    """
    blocks = [graph.block(path) for path in known_paths(graph, paths)]
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.path)
            hook = _without_addition(Identity(module, block))
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _without_addition(identity: Identity) -> Callable[..., Any]:
    def blend(kept: Any, computed: Any) -> Any:
        return None if kept is None else kept + 0.0 * (computed - kept)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        kept = identity(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return blend(kept, output)
        return tuple(blend(one, other) for one, other in zip(kept, output, strict=True))

    return hook


def _no_new_inputs(path: str, names: frozenset[str]) -> Callable[..., None]:
    def hook(model: nn.Module, args: Any, kwargs: Any) -> None:
        given = {name for name, value in named(model, args, kwargs).items() if isinstance(value, torch.Tensor)}
        if given - names:
            raise RequestError(
                f"'{path}' cannot be skipped with input '{min(given - names)}': the model was traced without it, and a "
                "stream that it opens would be lost; call flcompress.trace(model, inputs) with it"
            )

    return hook


def known_paths(graph: BlockGraph, paths: Iterable[str]) -> tuple[str, ...]:
    """The paths, each once, all of them blocks; RequestError on an unknown one."""
    wanted = [paths] if isinstance(paths, str) else paths
    return tuple(dict.fromkeys(graph.block(path).path for path in wanted))


def graph_of(model: nn.Module) -> BlockGraph:
    """The graph the model was last traced to; traced again when a list has changed its length, or never was."""
    graph, inputs = recall(model), inputs_like(model)
    try:
        return graph or trace(model, inputs)
    except ModelError as error:  # no example inputs for this class
        name = type(model).__name__
        raise RequestError(f"{name} was not traced; call flcompress.trace(model, inputs) once before") from error


class Identity:
    """A forward that hands the residual inputs on; silent outputs are zero, those that were None stay None."""

    def __init__(self, module: nn.Module, block: Block) -> None:
        if not block.streams:
            raise NotRemovable(f"'{block.path}' cannot be skipped: {block.reason or 'it carries no residual stream'}")
        names = positional_names(type(module).forward)
        self._outputs = block.outputs
        self._places = [
            (stream.output, stream.input, names.index(stream.input) if stream.input in names else stream.input)
            for stream in block.streams
        ]
        self._silent = block.silent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs: list[Any] = [None] * max(self._outputs, 1)
        for output, name, place in self._places:
            outputs[output] = kwargs[name] if name in kwargs else args[int(place)]
        for output in self._silent:
            outputs[output] = torch.zeros_like(next(one for one in outputs if one is not None))
        return tuple(outputs) if self._outputs else outputs[0]


@contextmanager
def replaced_forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Give the modules at the paths another forward; hooks, parameters and the state dict stay as they are."""
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
    """`known_paths`, and RequestError on an empty request."""
    wanted = known_paths(graph, paths)
    if not wanted:
        raise RequestError(f"no block of {graph.model_class} was named; expected at least one path")
    return wanted


def skipping(
    transformer: torch.nn.Module,
    paths: Iterable[str],
    graph: BlockGraph | None = None,
    guidance: float | None = None,
    skip: Callable[..., AbstractContextManager[None]] = skip,
) -> Network:
    """The transformer as a network in which the blocks at `paths` are identities; traced once where `graph` is None.

    Args:
        transformer: a stock model, or what an engine wrapped around one.
        paths: of the blocks.
        graph: its block graph.
        guidance: the embedded scale, where the network is told one.
        skip: `trace.skip.skip`, or `mute`.
    """
    network, skipped, model = as_network(transformer, guidance), tuple(paths), stock_model(transformer)
    graph = graph or graph_of(model)

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        with skip(model, skipped, graph=graph):
            return network(x, timestep, conditioning)

    return call
