"""The reference is stock torch at the same precision; the emulated bf16 graph rounds every result."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from flcompress.core.program import Program
from flcompress.exporters.onnx_graph.emulation import emulate_bf16
from flcompress.exporters.onnx_graph.write import write_onnx
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.parity import WideSums, cases, reference
from flcompress.models.loading import transformer_class
from flcompress.runtime.inputs import arguments_of, constants_of
from flcompress.runtime.sizes import size_of, step_of

pytestmark = pytest.mark.e2e

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def test_fp16_products_are_rounded_once() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw).half() for shape in [(64, 512), (32, 512), (32,)])
    with WideSums():
        made = torch.nn.functional.linear(x, weight, bias)
        bare = torch.nn.functional.linear(x, weight)
    exact = x.double() @ weight.double().T
    for found, expected in ((made, exact + bias.double()), (bare, exact)):
        assert found.dtype is torch.float16
        assert ((found - expected).abs() <= 2.0 * EPSILON[torch.float16] * expected.abs().clamp(min=0.1)).all()
        assert (found != expected).any()


def test_other_precisions_are_left_alone() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with WideSums():
        made = torch.nn.functional.linear(x, x)
    assert torch.equal(made, torch.nn.functional.linear(x, x))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_reference_is_the_stock_model(program: Program, precision: ExportPrecision) -> None:
    """As diffusers loads and runs it."""
    make = arguments_of(program)
    given = cases(make, [700.0, 20.0], [size_of(program, batch=2)])
    folder = program.components["transformer"]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    found = reference(folder, constants_of(make(size_of(program), [0.0], 0)), precision, given)[0]
    stock = transformer_class(folder).from_pretrained(str(folder), torch_dtype=dtype)
    inputs = {name: one if name == "timestep" else one.to(dtype) for name, one in given[0].items()}
    with torch.no_grad():
        expected = stock(**inputs, return_dict=False)[0].float()
    difference = (found - expected).abs().max()
    assert difference <= (4e-3 if precision == "fp16" else 0.0)


def test_an_emulated_graph_rounds_every_result(program: Program, tmp_path: Path) -> None:
    """Between operations stand numbers of bf16, and a weight is cast right before it is used."""
    source, target = tmp_path / "model.onnx", tmp_path / "emulated.onnx"
    step, size = step_of(program), size_of(program, batch=2)
    write_onnx(program.components["transformer"], arguments_of(program), size, step, "bf16", source)
    emulate_bf16(source, target)
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(target)), strict_mode=True).graph
    typed = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    made_by = {name: node for node in graph.node for name in node.output}
    place = {name: order for order, node in enumerate(graph.node) for name in node.output}
    rounds = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(rounds) == 4
    for node in rounds:  # inside the attention, where torch's exporter leaves no types
        (follower,) = [one for one in graph.node if node.output[0] in one.input]
        assert follower.op_type == "Cast"
        assert typed[follower.output[0]] == onnx.TensorProto.BFLOAT16
    kept = {"Cast", "Constant"}
    assert {node.op_type for name, node in made_by.items() if typed.get(name) == onnx.TensorProto.BFLOAT16} <= kept
    assert "CastLike" not in {node.op_type for node in graph.node}
    weights = {one.name for one in graph.initializer if len(one.dims) == 2}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in weights:
            first = min(order for order, one in enumerate(graph.node) if node.output[0] in one.input)
            assert first - place[node.output[0]] <= 2
