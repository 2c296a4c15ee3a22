"""Rewrites of a traced forward, before it becomes ONNX, of what ONNX and TensorRT express badly. The numbers stay.

They match operations alone, never at the model's class:
- a tensor filled every second channel in place (rotary positions), or from some index on, would become ScatterND with
  index tensors: a third more nodes, and no fused kernel. It becomes a stack, or a concatenation;
- a split into parts of varying size would become a sequence, which TensorRT cannot read; it becomes slices;
- what is summed in another type is cast before the sum, as torch does: the translations sum first, and bf16, that of a
  mask, has no 257;
- booleans filled by a mask become a logical operation: ONNX Runtime has no Where for booleans;
- complex numbers become pairs of real ones: ONNX and TensorRT have no complex numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from flcompress.errors import ModelError

aten = torch.ops.aten
END = 2**63 - 1


def rewrite(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrite the traced forward in place and return it."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and node.args[2:] == (0, END):  # the whole axis
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in (aten.split_with_sizes.default, aten.split.sizes):
            _slices(graph, node)
        elif node.target in (aten.sum.default, aten.sum.dim_IntList):
            _cast_before_sum(graph, node)
    for node in list(graph.nodes):
        if node.target in (aten.empty_like.default, aten.empty.memory_format):
            _stack_interleaved(graph, node)
    complex_nodes = {node for node in graph.nodes if _is_complex(node)}
    for node in list(graph.nodes):
        if node.target is aten.copy_.default:
            _concatenate(graph, node)
        elif node.target is aten.masked_fill.Scalar and _dtype(node) is torch.bool:
            _combine_masks(graph, node)
        elif node in complex_nodes:
            _as_pairs(graph, node)
    graph.lint()
    program.graph_module.recompile()
    return program


def _stack_interleaved(graph: fx.Graph, empty: Any) -> None:
    """`out = empty_like(x); out[..., 0::2] = a; out[..., 1::2] = b` -> `stack((a, b), -1).flatten(-2)`."""
    slices = [node for node in empty.users if node.target is aten.slice.Tensor and _fills(node) is not None]
    last_axis = empty.meta["val"].ndim - 1
    by_start: dict[int, Any] = {}
    for node in slices:
        _, axis, start, end, *step = node.args
        if axis in (last_axis, -1) and end == END and step == [len(slices)] and isinstance(start, int):
            by_start[start] = node
    if len(slices) < 2 or sorted(by_start) != list(range(len(slices))):
        return
    copies = [_fills(by_start[start]) for start in sorted(by_start)]
    last = max((copy for copy in copies if copy is not None), key=list(graph.nodes).index)
    with graph.inserting_after(last):
        parts = [graph.call_function(aten.to.dtype, (copy.args[1], _dtype(empty))) for copy in copies if copy]
    with graph.inserting_after(parts[0]):  # each was put straight after the copy, so the first is the last in the graph
        stacked = graph.call_function(aten.stack.default, (parts, -1))
    with graph.inserting_after(stacked):
        result = graph.call_function(aten.flatten.using_ints, (stacked, -2))
    result.meta = dict(empty.meta)
    empty.replace_all_uses_with(result, delete_user_cb=lambda user: user not in slices)
    for copy, node in zip(copies, [by_start[start] for start in sorted(by_start)], strict=True):
        if copy is not None:
            graph.erase_node(copy)
            graph.erase_node(node)
    graph.erase_node(empty)


def _concatenate(graph: fx.Graph, copy: Any) -> None:
    """`x[:, n:] = y` -> `x = cat((x[:, :n], y))`, where nothing else reads x's memory."""
    part, source = copy.args
    if not isinstance(part, fx.Node) or part.target is not aten.slice.Tensor or len(part.args) != 4:
        return
    base, axis, start, end = part.args
    if end != END or not isinstance(base, fx.Node) or len(part.users) != 1 or not _alone(base):
        return
    before = set(list(graph.nodes)[: list(graph.nodes).index(copy) + 1])
    with graph.inserting_after(copy):
        head = graph.call_function(aten.slice.Tensor, (base, axis, 0, start))
    with graph.inserting_after(head):
        cast = graph.call_function(aten.to.dtype, (source, _dtype(base)))
    with graph.inserting_after(cast):
        joined = graph.call_function(aten.cat.default, ([head, cast], axis))
    joined.meta = dict(base.meta)
    base.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in before and user is not head)
    graph.erase_node(copy)
    graph.erase_node(part)


def _cast_before_sum(graph: fx.Graph, node: Any) -> None:
    dtype = node.kwargs.get("dtype")
    if dtype not in (None, _dtype(node.args[0])):
        with graph.inserting_before(node):
            node.update_arg(0, graph.call_function(aten.to.dtype, (node.args[0], dtype)))


def _combine_masks(graph: fx.Graph, node: Any) -> None:
    mask, where, value = node.args
    with graph.inserting_before(node):
        if value:
            result = graph.call_function(aten.logical_or.default, (mask, where))
        else:
            result = graph.call_function(
                aten.logical_and.default, (mask, graph.call_function(aten.logical_not.default, (where,)))
            )
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _fills(part: Any) -> Any:
    """Return the copy into this slice if the slice has no other use, else None."""
    users = list(part.users)
    return users[0] if len(users) == 1 and users[0].target is aten.copy_.default and users[0].args[0] is part else None


def _alone(node: Any) -> bool:
    """Return whether this memory is read through no other view: every tensor that it is a view of has no other user."""
    while isinstance(node.target, torch._ops.OpOverload) and _is_view(node.target):
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        node = source
    return bool(node.op == "call_function")


def _is_view(operation: torch._ops.OpOverload) -> bool:
    # reshape and the like may copy, and so do not say that they alias.
    named = operation in (aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints, aten.contiguous.default)
    return named or any(argument.alias_info is not None for argument in operation._schema.returns)


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def _slices(graph: fx.Graph, node: Any) -> None:
    """`split_with_sizes` with sizes that vary -> slices: ONNX would write a sequence, which TensorRT cannot read."""
    source, sizes, *axis = node.args
    axis_index = axis[0] if axis else node.kwargs.get("dim", 0)
    if all(isinstance(size, int) for size in sizes):
        return
    starts: list[Any] = [0]
    with graph.inserting_before(node):
        for size in sizes[:-1]:
            first = starts[-1] == 0 if isinstance(starts[-1], int) else False
            starts.append(size if first else graph.call_function(operator.add, (starts[-1], size)))
        ends = [*starts[1:], END]
        parts = [
            graph.call_function(aten.slice.Tensor, (source, axis_index, start, end))
            for start, end in zip(starts, ends, strict=True)
        ]
    for item in list(node.users):  # operator.getitem, each
        parts[item.args[1]].meta = dict(item.meta)
        item.replace_all_uses_with(parts[item.args[1]])
        graph.erase_node(item)
    graph.erase_node(node)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val")
    inputs = [source.meta.get("val") for source in node.all_input_nodes]
    complex_ = [isinstance(tensor, Tensor) and tensor.is_complex() for tensor in (value, *inputs)]
    return node.op == "call_function" and any(complex_)


def _as_pairs(graph: fx.Graph, node: Any) -> None:
    """Rewrite complex numbers as pairs of real ones on a new last axis; inputs have been rewritten before."""
    first, *rest = node.args
    with graph.inserting_before(node):
        if node.target in (aten.view_as_complex.default, aten.view_as_real.default):
            pair = first
        elif node.target is aten.unsqueeze.default:
            axis = rest[0] if rest[0] >= 0 else rest[0] - 1
            pair = graph.call_function(aten.unsqueeze.default, (first, axis))
        elif node.target is aten.mul.Tensor:
            (a, b), (c, d) = (
                [graph.call_function(aten.select.int, (operand, -1, n)) for n in (0, 1)] for operand in node.args
            )

            def times(first: Any, other: Any) -> Any:
                return graph.call_function(aten.mul.Tensor, (first, other))

            real = graph.call_function(aten.sub.Tensor, (times(a, c), times(b, d)))
            imaginary = graph.call_function(aten.add.Tensor, (times(a, d), times(b, c)))
            pair = graph.call_function(aten.stack.default, ([real, imaginary], -1))
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            return
        else:
            raise ModelError(
                f"onnx: the forward computes {node.target} on complex numbers, which ONNX and TensorRT lack; "
                "write it with real ones (cos and sin), or leave 'onnx' out of exports:"
            )
    node.replace_all_uses_with(pair)
    graph.erase_node(node)
