"""The ONNX export agrees with torch in every batch size, and says so; a disagreement is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from pydantic import ValidationError

from flcompress.errors import ModelError, PostconditionError, UnavailableError
from flcompress.exporters import onnx_model
from flcompress.exporters.files import sha256
from flcompress.exporters.onnx_model import OnnxExporter, write_onnx
from flcompress.exporters.onnx_session import OnnxSession
from flcompress.exporters.parity import Parity, cases, compare, outputs
from flcompress.exporters.shapes import shapes_of
from flcompress.exporters.wan_onnx import Denoiser, adapted
from flcompress.models.loading import load_transformer
from flcompress.pipeline.program import Program
from tests.exporters.conftest import silent


def test_the_manifest_states_what_was_measured(run: Path, program: Program) -> None:
    folder = run / "exports" / "onnx"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == {"model.onnx": sha256(folder / "model.onnx")}
    assert 0.0 < manifest["difference"] < 1e-5 < manifest["tolerance"] == 1e-4
    assert manifest["cases"] == 8
    assert manifest["inputs"] == [
        {"name": "hidden_states", "shape": ["batch", 16, 3, 8, 8], "dtype": "float32"},
        {"name": "timestep", "shape": ["batch"], "dtype": "float32"},
        {"name": "encoder_hidden_states", "shape": ["batch", 16, 64], "dtype": "float32"},
    ]
    assert manifest["outputs"] == [{"name": "velocity", "shape": ["batch", 16, 3, 8, 8], "dtype": "float32"}]
    assert manifest["contract"]["sigmas"] == list(program.contract.sigmas)
    assert manifest["kept"] == dict(program.kept)


def test_the_graph_is_portable(run: Path) -> None:
    """Bindings as the manifest states them, plain operators, one opset, no paths of the machine that made it."""
    path = run / "exports" / "onnx" / "model.onnx"
    graph = onnx.load(str(path)).graph
    for tensor, rank in zip([*graph.input, *graph.output], (5, 1, 3, 5), strict=True):
        axes = tensor.type.tensor_type.shape.dim
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert len(axes) == rank
        assert axes[0].dim_param == "batch"
    kinds = {node.op_type for node in graph.node}
    assert kinds.isdisjoint({"ScatterND", "Range", "Attention", "RMSNormalization"})
    assert {node.domain for node in graph.node} == {""}
    assert b"/transformer_wan.py" not in path.read_bytes()


def test_any_batch_goes_through(run: Path, program: Program) -> None:
    given = cases(shapes_of(program), [700.0, 20.0], batches=(2, 5))
    transformer = Denoiser(load_transformer(program.components["transformer"]))
    session = OnnxSession(run / "exports" / "onnx" / "model.onnx")
    assert compare(outputs(transformer.on, given), outputs(session, given), 1e-5).require("it", "").cases == 4


def test_the_rewriting_changes_no_number(program: Program) -> None:
    shapes = shapes_of(program)
    given = cases(shapes, program.contract.timesteps)
    folder = program.components["transformer"]
    stock = outputs(Denoiser(load_transformer(folder)).on, given)
    ours = outputs(adapted(load_transformer(folder), shapes).on, given)
    assert compare(stock, ours, 1e-6).difference <= 1e-6
    untouched = outputs(Denoiser(load_transformer(folder)).on, given)  # the class itself was not patched
    assert compare(stock, untouched, 1e-6).difference == 0.0


def test_large_weights_go_to_a_file_of_their_own(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "EXTERNAL_ABOVE", 1000)
    shapes = shapes_of(program)
    write_onnx(adapted(load_transformer(program.components["transformer"]), shapes), shapes, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    given = cases(shapes, [700.0])
    reference = outputs(Denoiser(load_transformer(program.components["transformer"])).on, given)
    compare(reference, outputs(OnnxSession(tmp_path / "model.onnx"), given), 1e-5).require("it", "")


def test_a_difference_above_the_tolerance_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(PostconditionError) as caught:
        OnnxExporter(tolerance=1e-9).export(program, tmp_path, tmp_path / "exports", silent)
    assert str(caught.value).startswith(f"{tmp_path}/exports/onnx/model.onnx: differs from torch by ")
    assert str(caught.value).endswith(
        "expected at most 1e-09; raise onnx.tolerance only if that is small enough for you"
    )


@pytest.mark.parametrize("given", [0.0, -1e-4, float("nan")])
def test_a_tolerance_is_positive(given: float) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        OnnxExporter(tolerance=given)


def test_image_to_video_is_refused(program: Program) -> None:
    transformer = load_transformer(program.components["transformer"])
    transformer.register_to_config(image_dim=8)
    with pytest.raises(
        ModelError, match=r"^onnx: image_dim 8 given, expected null: only text-to-video Wan is exported$"
    ):
        adapted(transformer, shapes_of(program))


def test_a_silent_fallback_to_the_cpu_is_refused(run: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UnavailableError, match="CPUExecutionProvider, CUDAExecutionProvider was asked for"):
        OnnxSession(run / "exports" / "onnx" / "model.onnx", "cuda")


def test_parity_finds_a_number_that_is_none() -> None:
    found = compare([torch.zeros(2)], [torch.tensor([0.0, float("nan")])], 1.0)
    with pytest.raises(PostconditionError, match=r"^it: differs from torch by nan at most, over 1 cases"):
        found.require("it", "mend")
    assert Parity(difference=1.0, magnitude=1.0, tolerance=1.0, cases=1).require("it", "mend").difference == 1.0


def test_parity_finds_another_shape() -> None:
    with pytest.raises(PostconditionError, match=r"^case 0: output \[1\] given, expected \[2\]$"):
        compare([torch.zeros(2)], [torch.zeros(1)], 1.0)


def test_the_samples_of_a_batch_stand_at_different_timesteps(program: Program) -> None:
    given = cases(shapes_of(program), [float(t) for t in range(50)])
    assert [len(one["timestep"]) for one in given] == [1, 1, 1, 1, 3, 3, 3, 3]
    assert [one["timestep"].tolist() for one in given[:5]] == [[0.0], [16.0], [32.0], [49.0], [0.0, 16.0, 32.0]]
