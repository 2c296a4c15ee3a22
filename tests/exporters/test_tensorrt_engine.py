"""A real engine is built here without a GPU; where one cannot be built or run, one line says why."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from pydantic import ValidationError

from flcompress.core.program import Program
from flcompress.errors import FlcompressError, PostconditionError, RequestError, UnavailableError
from flcompress.exporters.tensorrt_build.build import build_engine
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.tensorrt_build.sizes import sizes_in
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.files import sha256
from flcompress.runtime import tensorrt_api
from flcompress.runtime.tensorrt_api import cuda_driver, installed, load_tensorrt
from flcompress.runtime.tensorrt_session import TensorRTSession
from tests.fixtures.exports import silent

pytestmark = pytest.mark.e2e


def builder() -> Any:
    if not installed("tensorrt-rtx"):
        pytest.skip("tensorrt_rtx is not installed")
    return load_tensorrt("tensorrt_rtx")


def without_gpu() -> None:
    if cuda_driver():
        pytest.skip("this machine has a CUDA driver")


def test_a_real_engine_with_its_manifest(run: Path, program: Program, tmp_path: Path) -> None:
    trt = builder()
    ranges = {"batch": (1, 1, 2), "height": (32, 32, 64), "frames": (9, 9, 17)}
    exporter = TensorRTExporter(targets=("sm80", "sm89"), profiles=(Profile(**ranges),))
    exporter.check()
    summary = exporter.export(program, tmp_path, run / "exports", silent)
    engine = tmp_path / "model.engine"
    assert engine.stat().st_size == summary["bytes"] > 100_000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sha256"] == sha256(engine) == summary["sha256"]
    assert manifest["source"] == {
        "file": os.path.relpath(run / "exports" / "onnx" / "model.onnx", tmp_path),
        "sha256": sha256(run / "exports" / "onnx" / "model.onnx"),
    }
    assert manifest["builder"] == {"name": trt.__name__, "version": trt.__version__}
    assert manifest["targets"] == ["sm80", "sm89"]
    assert manifest["precision"] == "fp32"
    (shapes,) = manifest["shapes"]
    assert [shapes[what]["hidden_states"] for what in ("min", "opt", "max")] == [
        [1, 16, 3, 8, 8],
        [1, 16, 3, 8, 8],
        [2, 16, 5, 16, 8],
    ]
    assert manifest["profiles"] == [{name: list(one) for name, one in ranges.items()} | {"width": None}]
    assert manifest["timesteps"] == list(program.contract.timesteps)
    assert manifest["sigmas"] == list(program.contract.sigmas)
    assert manifest["shift"] == program.contract.shift
    assert manifest["guidance_scale"] == 1.0
    assert manifest["kept"] == dict(program.kept)
    assert [tensor["name"] for tensor in manifest["inputs"]] == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert exporter.fingerprint() == f"{trt.__name__} {trt.__version__}"


@pytest.mark.gpu
def test_the_engine_agrees_with_torch(run: Path, program: Program, tmp_path: Path) -> None:
    builder()
    if not cuda_driver():
        pytest.skip("no CUDA driver")
    TensorRTExporter(targets=("current",), profiles=(Profile(batch=(1, 1, 3)),)).export(
        program, tmp_path, run / "exports", silent
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["checked_on_gpu"]
    assert manifest["difference"] < 1e-3


def test_a_node_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    trt = builder()
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], name="the_odd_one", domain="elsewhere")
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", onnx.TensorProto.FLOAT, ["n", 2])], [value("y", onnx.TensorProto.FLOAT, ["n", 2])]
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("elsewhere", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    with pytest.raises(
        FlcompressError, match=r"odd\.onnx: node 'the_odd_one' \(Unheard\): .*cannot read this graph$"
    ) as caught:
        build_engine(trt, path, targets=("sm89",), profiles=[])
    assert "\n" not in str(caught.value)


def test_a_build_that_fails_gives_its_reason(run: Path) -> None:
    trt = builder()
    without_gpu()
    shapes = {"hidden_states": [1, 16, 3, 8, 8], "timestep": [1], "encoder_hidden_states": [1, 16, 64]}
    with pytest.raises(FlcompressError, match=r"built no engine for current: .*(CUDA|Cuda Runtime)") as caught:
        build_engine(trt, run / "exports" / "onnx" / "model.onnx", targets=("current",), profiles=[[shapes] * 3])
    assert "\n" not in str(caught.value)


def test_a_builder_whose_libraries_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(tensorrt_api, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(
        UnavailableError, match=r"^tensorrt: tensorrt is installed but does not import \(libnvinfer.*file\)"
    ):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["sm89", "sm89"]}, "a target is given twice: sm89, sm89"),
        ({"targets": ["current", "sm89"]}, "'current' must stand alone"),
        ({"targets": []}, "at least 1 item"),
        ({"targets": ["sm12"]}, "'sm80', 'sm86', 'sm89', 'sm90', 'sm100', 'sm103', 'sm120', 'sm121' or 'current'"),
        ({"profiles": [{"batch": [0, 1, 1]}]}, "greater than or equal to 1"),
        ({"profiles": [{"batch": [2, 1, 4]}]}, r"\[2, 1, 4\] given, expected \[smallest, tuned for, largest\]"),
        ({"profiles": [{"length": [1, 1, 1]}]}, "Extra inputs are not permitted"),
        ({"precision": "int3"}, "'fp32', 'fp16' or 'bf16'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TensorRTExporter(**arguments)


def test_a_damaged_source_is_refused(run: Path, program: Program, tmp_path: Path) -> None:
    builder()
    exports = tmp_path / "exports"
    shutil.copytree(run / "exports" / "onnx", exports / "onnx")
    (exports / "onnx" / "model.onnx").write_bytes(b"half")
    with pytest.raises(RequestError, match=r"onnx/model\.onnx: SHA-256 [0-9a-f]{12}\.\.\. found, its manifest states"):
        TensorRTExporter().export(program, tmp_path, exports, silent)


def test_a_source_of_another_contract_is_refused(run: Path, program: Program, tmp_path: Path) -> None:
    builder()
    other = replace(program, contract=program.teacher_contract)
    with pytest.raises(PostconditionError, match="its sampling contract is not this program's"):
        TensorRTExporter().export(other, tmp_path, run / "exports", silent)


def test_an_engine_of_another_precision_than_its_source(run: Path, program: Program, tmp_path: Path) -> None:
    builder()
    with pytest.raises(RequestError) as caught:
        TensorRTExporter(precision="bf16").export(program, tmp_path, run / "exports", silent)
    assert str(caught.value) == (
        "tensorrt.precision: bf16 given, but the ONNX export it is built from is fp32; set onnx.precision: bf16 too"
    )


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (
            {"frames": (9, 10, 17)},
            "tensorrt.profiles: frames: 10 given, expected 1 plus a multiple of 4 for this model, such as 9 or 13",
        ),
        (
            {"height": (32, 36, 40)},
            "tensorrt.profiles: height: 36 given, expected a multiple of 8 for this model, such as 32 or 40",
        ),
        (
            {"width": (32, 32, 1024)},
            "tensorrt.profiles: width of 128 tokens given, but rope_max_seq_len of the transformer's config.json is "
            "64; choose a smaller size",
        ),
    ],
)
def test_sizes_that_the_model_does_not_take(ranges: dict[str, Any], message: str, program: Program) -> None:
    with pytest.raises(RequestError) as caught:
        sizes_in(Profile(**ranges), program, ["batch", "frames", "height", "width"], "tensorrt")
    assert str(caught.value) == message


def test_sizes_that_the_graph_does_not_take(program: Program) -> None:
    with pytest.raises(RequestError) as caught:
        sizes_in(Profile(height=(32, 32, 64)), program, ["batch"], "tensorrt")
    assert str(caught.value) == (
        "tensorrt.profiles: height [32, 32, 64] given, but a graph of WanTransformer3DModel has one height; leave "
        "height out"
    )


def test_no_source(program: Program, tmp_path: Path) -> None:
    builder()
    with pytest.raises(
        RequestError, match=r"onnx/manifest\.json: not exported yet; make it with: 'onnx' under exports:"
    ):
        TensorRTExporter().export(program, tmp_path, tmp_path, silent)


def test_running_an_engine_without_a_gpu_says_so(tmp_path: Path) -> None:
    without_gpu()
    with pytest.raises(UnavailableError, match=r"^backend tensorrt: no CUDA driver here"):
        TensorRTSession(tmp_path / "model.engine", {"builder": {"name": "tensorrt_rtx", "version": "1.2"}})
