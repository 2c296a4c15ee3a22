"""Attention as one operator: the graph of every kind of attention agrees with torch, and holds no mask of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.shared import TOLERANCES, ExportPrecision
from tests.exporters.test_fused_attention import needs_the_operator
from tests.families.exports import exportable

pytestmark = [
    pytest.mark.e2e,
    needs_the_operator,
]


def silent(done: int, total: int, values: object) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "opset", "counted"),
    [
        ("wan", 23, 0),  # no mask; attention to the prompt
        ("hunyuan-video", 24, 4),  # padding of the prompt, in every block; a mask of its own in the refiner
        ("cogvideox-1.5-i2v", 23, 0),
        ("ltx", 23, 0),  # a mask of one row for all queries
        ("flux", 23, 0),
        ("sd3", 23, 0),
    ],
)
def test_the_fused_graph_agrees_with_torch(name: str, opset: int, counted: int, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    OnnxExporter(attention="fused").export(exportable(name, tmp_path), folder, tmp_path, silent)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["opset"] == opset
    assert manifest["difference"] <= 5e-5
    nodes = onnx.load(str(folder / "model.onnx")).graph.node
    attention = [node for node in nodes if node.op_type == "Attention"]
    assert len([node for node in attention if len(node.input) > 6]) == counted
    assert attention
    assert "Softmax" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_fused_graph_agrees_in_half_precision(precision: ExportPrecision, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    exporter = OnnxExporter(attention="fused", precision=precision)
    summary = exporter.export(exportable("wan", tmp_path), folder, tmp_path, silent)
    assert summary["difference"] <= TOLERANCES[precision]
