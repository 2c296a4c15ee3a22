"""A transformer's forward as the graph that Torch-TensorRT converts, with its weights; nothing of it stays in torch."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from flcompress.errors import FlcompressError
from flcompress.exporters.onnx_graph.rewrites import rewrite
from flcompress.exporters.onnx_graph.write import quiet
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.weights import DTYPES
from flcompress.models.families import family_of
from flcompress.models.loading import load_transformer
from flcompress.models.network import stock_name
from flcompress.runtime.inputs import Denoiser, Inputs

MODULE = "transformer."
"""What the names of the transformer's modules begin with in the graph of a `Denoiser`."""


def lower(
    folder: Path,
    inputs: Inputs,
    constants: dict[str, Any],
    varying: dict[str, dict[int, str]],
    precision: ExportPrecision,
    settings: Any,
) -> fx.GraphModule:
    """Return the graph of the forward in operators that have a converter, strongly typed by its own casts.

    Args:
        folder: the transformer's.
        inputs: tensors to trace with.
        constants: forward arguments that are not tensors.
        varying: input -> its axes that vary; none for a graph of one size.
        precision: precision of the weights and the arithmetic.
        settings: Torch-TensorRT's `CompilationSettings`.

    Raises:
        ModelError: complex numbers in the forward.
        FlcompressError: an operator without a converter; names it and its module.
    """
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    transformer = load_transformer(folder, "cpu", DTYPES[precision])
    denoiser = Denoiser(transformer, constants, DTYPES[precision]).eval()
    family_of(stock_name(transformer)).prepare_export(transformer)
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(axes, auto) for name, axes in varying.items()} if varying else None
    with quiet(), torch.no_grad():
        exported = torch.export.export(
            denoiser, (dict(inputs),), dynamic_shapes=None if shapes is None else (shapes,), strict=False
        )
        exported = pre_export_lowering(rewrite(exported), settings)
        exported = exported.run_decompositions(get_decompositions(settings.enable_experimental_decompositions))
        plain = count_from_start(spread_copies(exported.module()))
        graph: fx.GraphModule = post_lowering(plain, settings)
    require_converters(graph, settings)
    return graph


def spread_copies(graph: fx.GraphModule) -> fx.GraphModule:
    """Expand, in place, what is copied into a larger tensor, as by `mask[..., 0] = True`: the converter does not."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        target, source, *_ = node.args
        shape = target.meta["val"].shape
        if source.meta["val"].shape == shape:
            continue
        with graph.graph.inserting_before(node):
            lengths = [
                length if isinstance(length, int) else _call(graph.graph, aten.sym_size.int, (target, axis), node)
                for axis, length in enumerate(shape)
            ]
            node.update_arg(1, _call(graph.graph, aten.expand.default, (source, lengths), node))
    graph.recompile()
    return graph


def count_from_start(graph: fx.GraphModule) -> fx.GraphModule:
    """Write `x[:, -16:]` of a varying axis, in place, as `x[:, n - 16:]`.

    Torch-TensorRT 2.14.0 computes such a start as length minus count for every axis. Where another axis varies, such as
    the batch, it takes -1 for that one's count, and starts behind its end.
    """
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is not aten.slice.Tensor or len(node.args) < 3:
            continue
        source, axis, start, *_ = node.args
        if not isinstance(start, int) or start >= 0 or isinstance(source.meta["val"].shape[axis], int):
            continue
        with graph.graph.inserting_before(node):
            length = _call(graph.graph, aten.sym_size.int, (source, axis), node)
            node.update_arg(2, _call(graph.graph, operator.add, (length, start), node))
    graph.recompile()
    return graph


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Insert a call, with the metadata that it has in place of `like`."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda source: source.meta["val"])
    node.meta = {key: value for key, value in like.meta.items() if key == "nn_module_stack"}
    node.meta["val"] = target(*values)
    return node


def require_converters(graph: fx.GraphModule, settings: Any) -> None:
    """Raise FlcompressError, with the operator and its module's path, where a part of the graph would stay in torch."""
    if missing := unconverted(graph, settings):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FlcompressError(
            f"torch-tensorrt: {missing[0]}{more} has no converter, and would stay in torch; write the operator in "
            "plain arithmetic, or leave 'torch-tensorrt' out of exports:"
        )


def unconverted(graph: fx.GraphModule, settings: Any) -> list[str]:
    """Return the operators that Torch-TensorRT has no converter for, each with the path of its module."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    return [
        f"{node.target} of '{module_of(node)}'"
        for node in graph.graph.nodes
        if is_operator(node) and DYNAMO_CONVERTERS.get(node) is None
    ]


def is_operator(node: fx.Node) -> bool:
    """Return whether a node computes."""
    return node.op in ("call_function", "call_method", "call_module")


def modules_of(node: fx.Node) -> list[str]:
    """Return the paths in the transformer of the modules that a node is in, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).removeprefix(MODULE) for path, _ in stack.values() if str(path).startswith(MODULE)]


def module_of(node: fx.Node) -> str:
    """Return the path of the innermost module that a node is in."""
    return (modules_of(node) or ["the transformer"])[-1]


def is_tensor(node: fx.Node) -> bool:
    """Return whether a node's value is a tensor, not a size."""
    return isinstance(node.meta.get("val"), Tensor)
