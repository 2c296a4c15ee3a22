"""Attention as one operator: masks that ONNX Runtime takes, in the numbers of those that torch was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from flcompress.errors import RequestError, UnavailableError
from flcompress.exporters.onnx_graph import attention as fused
from flcompress.exporters.onnx_graph.attention import fit_masks
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.tensorrt_build.export import require_plain_attention
from flcompress.frontend.recipe import arguments

HEADS, WIDTH = 2, 8


def attention(nodes: Sequence[onnx.NodeProto], mask_type: int, path: Path) -> int:
    """Write a model of one Attention whose mask the nodes make of `given`; return its opset."""
    qkv = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", HEADS, name, WIDTH]) for name in "qkv"]
    qkv[2].type.tensor_type.shape.dim[2].dim_param = "k"
    given = helper.make_tensor_value_info("given", mask_type, ["b"] if mask_type == TensorProto.INT32 else ["b", "k"])
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["sample"], name="attention")
    scalars = {"zero": 0, "one": 1}
    constants = [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in scalars.items()]
    constants += [
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(np.array([1, 2]), "axes"),
        numpy_helper.from_array(np.array([[True]]), "true"),
    ]
    output = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", HEADS, "q", WIDTH])]
    graph = helper.make_graph([*nodes, node], "g", [*qkv, given], output, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    ir = onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))
    fit_masks(ir)
    onnx_ir.save(ir, str(path))
    onnx.checker.check_model(str(path))
    return int(ir.graph.opset_imports[""])


def run(path: Path, q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "given": given.numpy()}
    return torch.from_numpy(session.run(None, feed)[0])


def tensors(queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, HEADS, length, WIDTH, generator=draw) for length in (queries, keys, keys))
    return q, k, v


def padding(*, negated: bool) -> list[onnx.NodeProto]:
    """The mask that keeps the first n keys of each sample, as two traces write it."""
    shape = [
        helper.make_node("Shape", ["k"], ["keys"], start=2, end=3),
        helper.make_node("Squeeze", ["keys", "zeros"], ["key_count"]),
        helper.make_node("Range", ["zero", "key_count", "one"], ["numbers"]),
        helper.make_node("Unsqueeze", ["numbers", "front"], ["row"]),
        helper.make_node("Cast", ["given"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["wide", "axis"], ["column"]),
        helper.make_node("Constant", [], ["zeros"], value_ints=[0]),
        helper.make_node("Constant", [], ["front"], value_ints=[0]),
    ]
    shape = [*shape[-2:], *shape[:-2]]
    if not negated:
        return [
            *shape,
            helper.make_node("Less", ["row", "column"], ["kept"]),
            helper.make_node("Unsqueeze", ["kept", "axes"], ["mask"]),
        ]
    return [
        *shape,
        helper.make_node("GreaterOrEqual", ["row", "column"], ["cut"]),
        helper.make_node("Not", ["cut"], ["kept"]),
        helper.make_node("Shape", ["kept"], ["size"]),
        helper.make_node("Expand", ["true", "size"], ["all"]),
        helper.make_node("And", ["all", "kept"], ["both"]),
        helper.make_node("Unsqueeze", ["both", "axis"], ["three"]),
        helper.make_node("Unsqueeze", ["three", "axis"], ["mask"]),
    ]


def lacks_the_operator() -> bool:
    try:
        fused.require_fused_attention()
    except UnavailableError:
        return True
    return False


needs_the_operator = pytest.mark.skipif(lacks_the_operator(), reason="ONNX or ONNX Runtime is older than the operator")


@needs_the_operator
@pytest.mark.parametrize("negated", [False, True])
def test_a_mask_of_padding_becomes_the_count_of_keys(negated: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    opset = attention(padding(negated=negated), TensorProto.INT32, path)
    assert opset == 24
    node = next(node for node in onnx.load(str(path)).graph.node if node.op_type == "Attention")
    assert node.input[3] == ""
    assert node.input[6]
    q, k, v = tensors()
    counts = torch.tensor([7, 4, 1], dtype=torch.int32)
    mask = (torch.arange(7) < counts[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(run(path, q, k, v, counts), expected)


@needs_the_operator
def test_any_other_mask_of_one_row_is_repeated_for_every_query(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    opset = attention([helper.make_node("Unsqueeze", ["given", "axes"], ["mask"])], TensorProto.FLOAT, path)
    assert opset == 23
    q, k, v = tensors()
    bias = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
    torch.testing.assert_close(run(path, q, k, v, bias), expected)


def test_the_default_leaves_the_keys_of_old_exports() -> None:
    assert arguments(OnnxExporter()) == {"precision": "fp32", "tolerance": None}
    assert arguments(OnnxExporter(attention="fused")) == {"precision": "fp32", "tolerance": None, "attention": "fused"}


def test_an_older_onnx_runtime_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.SINCE, "onnxruntime", (99, 0))
    OnnxExporter().check()
    with pytest.raises(UnavailableError) as caught:
        OnnxExporter(attention="fused").check()
    assert str(caught.value) == (
        f"onnx.attention: fused given, but onnxruntime {onnxruntime.__version__} lacks opset 24, which onnxruntime "
        "99.0 has; update it, or set onnx.attention: plain"
    )


def test_no_engine_is_built_from_the_operator() -> None:
    path = Path("onnx/manifest.json")
    require_plain_attention(22, path)
    with pytest.raises(RequestError) as caught:
        require_plain_attention(23, path)
    assert str(caught.value) == (
        "onnx/manifest.json: onnx.attention: fused given, but TensorRT builds that operator for some head sizes only; "
        "set onnx.attention: plain"
    )
