"""Families whose forward needs rewriting: the graph agrees with torch at every size, and an engine builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.runtime.tensorrt_api import installed
from tests.families.exports import exportable

pytestmark = pytest.mark.e2e

SIZES = ["frames", "height", "width"]


def silent(done: int, total: int, values: object) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("wan-ti2v", ["batch", *SIZES, "tokens"]),  # a timestep for every token
        ("hunyuan-video", ["batch", *SIZES]),  # a mask from a sum
        ("hunyuan-video-i2v-replace", ["batch", *SIZES]),  # its own blocks, which tell the first frame from the rest
        ("cogvideox", ["batch", *SIZES, "tokens"]),  # rotary tables as inputs
        ("mochi", ["batch", *SIZES]),  # a loop over samples
        ("cogvideox-2b", ["batch", *SIZES]),  # positions added, made for each size
        ("ltx", ["batch", "tokens"]),  # sizes as numbers
        ("qwen-image", ["batch", "tokens"]),  # sizes as numbers, complex numbers
    ],
)
def test_a_family_exports(name: str, dynamic: list[str], tmp_path: Path) -> None:
    program = exportable(name, tmp_path)
    for what in ("onnx", "tensorrt"):
        (tmp_path / what).mkdir()
    summary = OnnxExporter().export(program, tmp_path / "onnx", tmp_path, silent)
    assert sorted(summary["dynamic"]) == sorted(dynamic)
    assert 0.0 <= summary["difference"] <= 1e-4
    if not installed("tensorrt-rtx"):
        pytest.skip("tensorrt_rtx is not installed")
    ranges = Profile(batch=(1, 1, 2), height=(32, 32, 64))
    exporter = TensorRTExporter(profiles=(ranges,))
    assert exporter.export(program, tmp_path / "tensorrt", tmp_path, silent)["bytes"] > 0
