"""A bf16 graph as one that ONNX Runtime can run on a CPU, which has no bf16 kernels, for the parity check.

Every operation computes in fp32 on numbers of bf16 and its result is rounded to bf16: what a GPU does, up to the order
of its sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def emulate_bf16(source: Path, target: Path) -> None:
    """Write to `target`, in the folder of `source`, the emulated graph; it shares the file of external weights.

    A weight's cast to fp32 stands right before the weight's first use. ONNX Runtime keeps to that order (it would not
    if it had to add casts of its own), and so holds the weights of one layer in fp32, not those of all.
    """
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass

    # Inside an attention that torch's exporter has written out, nothing says which results are of bf16.
    model = ShapeInferencePass()(onnx_ir.load(str(source))).model
    graph = model.graph
    nodes = list(graph)
    order = {node: position for position, node in enumerate(nodes)}
    for node in nodes:
        if node.op_type == "CastLike":  # ONNX Runtime would make a Cast of it, and put that last
            node.op_type = "Cast"
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(node.outputs[0].dtype or onnx_ir.DataType.UNDEFINED))
            node.resize_inputs(1)
    for value in list(graph.initializers.values()):
        uses = [use for use in value.uses() if use[0].op_type != "Cast"]
        if value.dtype == onnx_ir.DataType.BFLOAT16 and uses:
            up = _cast(value, onnx_ir.DataType.FLOAT)
            min((node for node, _ in uses), key=lambda node: order[node]).prepend(up)
            _hand_over(uses, up.outputs[0])
    for node in nodes:
        for output in node.outputs:
            if output.dtype != onnx_ir.DataType.BFLOAT16:
                continue
            casts = [use for use in output.uses() if use[0].op_type == "Cast"]
            others = [use for use in output.uses() if use[0].op_type != "Cast"]
            last, rounded = node, output
            if node.op_type not in ("Cast", "Constant"):
                output.dtype = onnx_ir.DataType.FLOAT
                last = _cast(output, onnx_ir.DataType.BFLOAT16)
                rounded = last.outputs[0]
                node.append(last)
                _hand_over(casts, rounded)
            if others:
                up = _cast(rounded, onnx_ir.DataType.FLOAT)
                last.append(up)
                _hand_over(others, up.outputs[0])
    onnx_ir.save(model, str(target))


def _cast(value: Any, to: Any) -> Any:
    import onnx_ir

    node = onnx_ir.node("Cast", [value], {"to": int(to)})
    node.outputs[0].name = f"{value.name}.{to.name}"
    node.outputs[0].dtype = to
    node.outputs[0].shape = value.shape
    return node


def _hand_over(uses: Any, value: Any) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)
