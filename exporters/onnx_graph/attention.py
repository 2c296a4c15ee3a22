"""Attention as the one operator of ONNX, in the form that ONNX Runtime's kernels take.

On an NVIDIA GPU its CUDA provider runs the operator by flash attention where it has no mask, in fp16 and bf16, and by
memory-efficient attention where it has one; on a CPU it has a kernel of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flcompress.errors import UnavailableError

ATTENTION_OPSET = 23
"""The first opset that has the operator."""

LENGTHS_OPSET = 24
"""The first whose operator takes the number of keys that are no padding, `nonpad_kv_seqlen`."""

MASK, LENGTHS = 3, 6
"""Positions of these inputs."""

SINCE = {"onnx": (1, 19), "onnxruntime": (1, 27)}
"""The first versions that have both opsets, with kernels."""


def require_fused_attention() -> None:
    """Raise UnavailableError where the installed ONNX or ONNX Runtime is older than the operator's last form."""
    for name, needed in SINCE.items():
        present = str(import_module(name).__version__)
        if tuple(int(part) for part in present.split(".")[:2]) < needed:
            raise UnavailableError(
                f"onnx.attention: fused given, but {name} {present} lacks opset {LENGTHS_OPSET}, which {name} "
                f"{'.'.join(map(str, needed))} has; update it, or set onnx.attention: plain"
            )


def fit_masks(model: Any) -> None:
    """Rewrite the masks of a model's attention in place; the numbers stay.

    A mask that only cuts off the keys behind the first n becomes n: tokens x tokens of memory less, and flash attention
    is possible. Any other mask of one row for all queries, which ONNX Runtime does not take, gets a row for each.
    """
    for node in list(model.graph):
        mask = node.inputs[MASK] if node.op_type == "Attention" and len(node.inputs) > MASK else None
        if mask is None:
            continue
        lengths = _key_counts(mask)
        if lengths is not None:
            node.resize_inputs(LENGTHS + 1)
            node.replace_input_with(MASK, None)
            node.replace_input_with(LENGTHS, _integers(node, lengths))
            model.graph.opset_imports[""] = LENGTHS_OPSET
        elif mask.shape is not None and mask.shape[-2] == 1:
            node.replace_input_with(MASK, _for_each_query(node, mask))


def _key_counts(mask: Any) -> Any | None:
    """Return the value [batch] that a mask [batch, 1, 1, keys] compares the number of each key with; None of another.

    Such is `and(true, not(range(keys) >= count))` or `range(keys) < count`, with axes of 1 put in.
    """
    value = _unsqueezed(mask)
    if _made_by(value, "And"):
        kept = [operand for operand in value.producer().inputs if not _is_true(operand)]
        if len(kept) != 1:
            return None
        value = kept[0]
    wanted = "Less"
    if _made_by(value, "Not"):
        value, wanted = value.producer().inputs[0], "GreaterOrEqual"
    if not _made_by(value, wanted):
        return None
    numbers, counts = (_unsqueezed(operand) for operand in value.producer().inputs)
    counts_from_zero = _made_by(numbers, "Range") and _constants(numbers.producer().inputs[::2]) == [0, 1]
    return counts if counts_from_zero and counts.shape is not None and len(counts.shape) == 1 else None


def _unsqueezed(value: Any) -> Any:
    """Return what a value is, but for axes of length 1 that were put in, and for casts of integers and booleans."""
    while _made_by(value, "Unsqueeze") or (_made_by(value, "Cast") and not _source(value).dtype.is_floating_point()):
        value = _source(value)
    return value


def _source(value: Any) -> Any:
    return value.producer().inputs[0]


def _made_by(value: Any, operator: str) -> bool:
    return value.producer() is not None and value.producer().op_type == operator


def _is_true(value: Any) -> bool:
    """Return whether a value is true everywhere: a constant, repeated."""
    while _made_by(value, "Expand"):
        value = value.producer().inputs[0]
    if _made_by(value, "ConstantOfShape"):
        fill = value.producer().attributes.get("value")
        return fill is not None and bool(fill.as_tensor().numpy().all())
    return value.const_value is not None and bool(value.const_value.numpy().all())


def _constants(values: Any) -> list[int] | None:
    """Return the numbers of scalar constants; None if any is none."""
    tensors = [value.const_value for value in values]
    return None if any(tensor is None for tensor in tensors) else [int(tensor.numpy()) for tensor in tensors]


def _integers(node: Any, counts: Any) -> Any:
    """Return the counts as int64, computed before the node."""
    import onnx_ir

    cast = onnx_ir.node("Cast", [counts], {"to": int(onnx_ir.DataType.INT64)})
    _name(cast, f"{node.outputs[0].name}.keys", onnx_ir.DataType.INT64, counts.shape)
    node.prepend(cast)
    return cast.outputs[0]


def _for_each_query(node: Any, mask: Any) -> Any:
    """Return the mask [batch or 1, heads or 1, 1, keys] repeated along the node's queries."""
    import onnx_ir

    own, queries = node.outputs[0].name, node.inputs[0]
    integer = onnx_ir.DataType.INT64
    one = onnx_ir.node("Constant", [], {"value_ints": [1]})
    _name(one, f"{own}.one", integer, onnx_ir.Shape([1]))
    length = onnx_ir.node("Shape", [queries], {"start": -2, "end": -1})
    _name(length, f"{own}.queries", integer, onnx_ir.Shape([1]))
    shape = onnx_ir.node("Concat", [one.outputs[0], one.outputs[0], length.outputs[0], one.outputs[0]], {"axis": 0})
    _name(shape, f"{own}.rows", integer, onnx_ir.Shape([4]))
    repeated = onnx_ir.node("Expand", [mask, shape.outputs[0]])
    lengths = onnx_ir.Shape([*mask.shape[:-2], queries.shape[-2], mask.shape[-1]])
    _name(repeated, f"{own}.mask", mask.dtype, lengths)
    node.prepend([one, length, shape, repeated])
    return repeated.outputs[0]


def _name(node: Any, name: str, dtype: Any, shape: Any) -> None:
    output = node.outputs[0]
    node.name, output.name, output.dtype, output.shape = name, name, dtype, shape
