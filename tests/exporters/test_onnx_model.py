"""The ONNX export agrees with torch in every batch size, and says so; a disagreement is refused."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from pydantic import ValidationError

from flcompress.core.program import Program
from flcompress.errors import PostconditionError, UnavailableError
from flcompress.exporters.onnx_graph import export as onnx_export
from flcompress.exporters.onnx_graph import write
from flcompress.exporters.onnx_graph.write import Axes, write_onnx
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.shared import TOLERANCES, ExportPrecision
from flcompress.exporters.shared.parity import Parity, cases, compare, outputs
from flcompress.files import sha256
from flcompress.models.loading import load_transformer
from flcompress.runtime import onnx_providers
from flcompress.runtime.generate import generate
from flcompress.runtime.inputs import arguments_of
from flcompress.runtime.onnx_session import OnnxSession
from flcompress.runtime.sizes import Size, size_of, step_of
from tests.fixtures.exports import silent

pytestmark = pytest.mark.e2e


def test_the_manifest_states_what_was_measured(run: Path, program: Program) -> None:
    folder = run / "exports" / "onnx"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == {"model.onnx": sha256(folder / "model.onnx")}
    assert 0.0 <= manifest["difference"] < manifest["tolerance"] == 1e-4  # how much below depends on the processor
    assert manifest["magnitude"] > 1e3 * manifest["tolerance"]
    assert manifest["cases"] == 2
    assert manifest["precision"] == "fp32"
    assert manifest["dynamic"] == ["batch", "frames", "height", "width"]
    assert manifest["checked"]["sizes"] == [[1, 3, 8, 8], [3, 4, 10, 12]]
    assert manifest["inputs"] == [
        {"name": "hidden_states", "shape": ["batch", 16, "frames", "height", "width"], "dtype": "float32"},
        {"name": "timestep", "shape": ["batch"], "dtype": "float32"},
        {"name": "encoder_hidden_states", "shape": ["batch", 16, 64], "dtype": "float32"},
    ]
    assert manifest["outputs"] == [
        {"name": "sample", "shape": ["batch", 16, "frames", "height", "width"], "dtype": "float32"}
    ]
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


def reference(program: Program, given: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """By the stock model, loaded as stock."""
    transformer = load_transformer(program.components["transformer"])
    return outputs(lambda inputs: transformer(**inputs, return_dict=False)[0], given)


def test_any_batch_and_any_size_go_through(run: Path, program: Program) -> None:
    """The rotary table is that of each size."""
    sizes = [Size(batch=2, frames=3, height=8, width=8), Size(batch=5, frames=7, height=4, width=20)]
    given = cases(arguments_of(program), [700.0, 20.0], sizes)
    session = OnnxSession(run / "exports" / "onnx" / "model.onnx")
    found = compare(reference(program, given), outputs(session, given), 2e-5).require("it", "")
    assert found.cases == 2


def test_large_weights_go_to_a_file_of_their_own(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "EXTERNAL_ABOVE", 1000)
    make, model = arguments_of(program), tmp_path / "model.onnx"
    write_onnx(program.components["transformer"], make, size_of(program, batch=2), step_of(program), "fp32", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    given = cases(make, [700.0], [size_of(program)])
    compare(reference(program, given), outputs(OnnxSession(model), given), 1e-5).require("it", "")


def test_a_difference_above_the_tolerance_is_refused(
    run: Path, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(*arguments: Any) -> Axes:
        shutil.copy(run / "exports" / "onnx" / "model.onnx", tmp_path)
        return Axes(inputs={}, output=[], opset=18)

    monkeypatch.setattr(onnx_export, "write_onnx", copied)
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


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
def test_half_precision_keeps_its_islands(
    precision: ExportPrecision, kind: int, program: Program, tmp_path: Path
) -> None:
    """What diffusers keeps in fp32 is fp32, doors are fp32, and what was compared is in the manifest."""
    exports = tmp_path / "exports"
    summary = OnnxExporter(precision=precision).export(program, tmp_path, exports, silent)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "model.onnx"]
    assert 0.0 < summary["difference"] <= TOLERANCES[precision] == manifest["tolerance"]
    assert 0.0 < manifest["difference_to_fp32"] < 2.0 * TOLERANCES[precision]
    assert manifest["torch_difference_to_fp32"] > 0.0
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["transformer.blocks.0.attn1.to_q.bias"] == kind
    assert types["transformer.blocks.0.norm2.weight"] == onnx.TensorProto.FLOAT
    assert types["transformer.condition_embedder.time_embedder.linear_1.bias"] == onnx.TensorProto.FLOAT
    assert {one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert manifest["checked"]["arithmetic"].startswith(precision if precision == "fp16" else "the same graph")


def test_no_onnx_runtime_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_providers, "find_spec", lambda name: None)
    mend = (
        "ONNX Runtime is not installed, which checks and runs ONNX exports; pip install 'flcompress[onnxruntime]', or "
        "'flcompress[onnxruntime-gpu]' on a machine with an NVIDIA GPU, but not both"
    )
    with pytest.raises(UnavailableError) as caught:
        OnnxExporter().check()
    assert str(caught.value) == f"onnx: {mend}"
    with pytest.raises(UnavailableError) as caught:
        generate(tmp_path, "a three", "onnx", tmp_path / "clip.gif")
    assert str(caught.value) == f"backend onnx: {mend}"


def test_neither_build_of_onnx_runtime_is_a_hard_dependency() -> None:
    """pip unpacks both into one folder, so whoever needs the other must be able to leave this one out."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert not [one for one in project["dependencies"] if one.startswith("onnxruntime")]
    holding = {name: [one for one in given if one.startswith("onnxruntime")] for name, given in extras.items()}
    assert {name for name, found in holding.items() if found} == {"onnxruntime", "onnxruntime-gpu", "onnxruntime-rtx"}
    for found in holding.values():  # no extra asks for both
        assert len({name for one in found for name in ("onnxruntime>", "onnxruntime-gpu>") if one.startswith(name)}) < 2


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
    sizes = [size_of(program, batch) for batch in (1, 1, 3)]
    given = cases(arguments_of(program), [float(t) for t in range(50)], sizes)
    assert [one["timestep"].tolist() for one in given] == [[0.0], [49.0], [32.0, 16.0, 0.0]]
