"""Engines for a data-centre card and engines whose weights are replaced: a real builder, and stand-ins for a GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from flcompress.core.program import Program
from flcompress.errors import FlcompressError
from flcompress.exporters.onnx_graph.write import write_onnx
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.tensorrt_build import export as exporting
from flcompress.exporters.tensorrt_build import refit
from flcompress.exporters.tensorrt_build.build import build_engine
from flcompress.exporters.tensorrt_build.export import TensorRTExport
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.tensorrt_build.refit import graph_digest, refit_engine
from flcompress.exporters.tensorrt_build.sizes import checked_sizes
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.files import sha256
from flcompress.runtime import tensorrt_session
from flcompress.runtime.backends.tensorrt_backend import TensorRTBackend
from flcompress.runtime.inputs import arguments_of
from flcompress.runtime.onnx_session import OnnxSession
from flcompress.runtime.sizes import Size, size_of, step_of
from flcompress.runtime.tensorrt_api import Card, card_here
from tests.fixtures.exports import silent

pytestmark = pytest.mark.e2e

HOPPER = Card("NVIDIA H100 80GB HBM3", "sm90")


def tiny_model(path: Path, weight: float = 1.0, shape: tuple[int, int] = (-1, 4)) -> Path:
    """x [n, 4] -> x W, reshaped; W is a weight, the shape is a part of the graph."""
    value, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    weights = numpy_helper.from_array(torch.full((4, 4), weight).numpy(), "weight")
    target = numpy_helper.from_array(torch.tensor(shape).numpy(), "shape")
    nodes = [
        onnx.helper.make_node("MatMul", ["hidden_states", "weight"], ["y"], name="product"),
        onnx.helper.make_node("Reshape", ["y", "shape"], ["sample"], name="shaped"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("hidden_states", kinds.FLOAT, ["n", 4])],
        [value("sample", kinds.FLOAT, ["n", 4])],
        [weights, target],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), str(path))
    return path


def test_a_graph_is_the_same_whatever_its_weights(tmp_path: Path) -> None:
    first, second = tiny_model(tmp_path / "first.onnx"), tiny_model(tmp_path / "second.onnx", weight=2.0)
    assert sha256(first) != sha256(second)
    assert graph_digest(first) == graph_digest(second)
    assert graph_digest(tiny_model(tmp_path / "other.onnx", shape=(-1, 2))) != graph_digest(first)
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(str(second)), str(outside), save_as_external_data=True, size_threshold=0, location="w.data")
    assert graph_digest(outside) != graph_digest(first), "shapes that are not in the file are not compared"


def trained(program: Program, folder: Path) -> Program:
    """The program with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(program.components["transformer"], folder)
    (weights,) = folder.glob("*.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return program.with_component("transformer", folder)


def test_two_students_of_one_architecture_have_the_same_graph(run: Path, program: Program, tmp_path: Path) -> None:
    student, model = trained(program, tmp_path / "transformer"), tmp_path / "model.onnx"
    size = size_of(student, batch=2)
    write_onnx(student.components["transformer"], arguments_of(student), size, step_of(student), "fp32", model)
    first = run / "exports" / "onnx" / "model.onnx"
    assert sha256(model) != sha256(first)
    assert graph_digest(model) == graph_digest(first)


@pytest.fixture
def as_tensorrt() -> Any:
    """TensorRT for RTX under the other's name and without what that lacks; its configuration notes what is set."""
    rtx = pytest.importorskip("tensorrt_rtx")

    class Configuration:
        def __init__(self, real: Any) -> None:
            self.__dict__["real"] = real

        def __getattr__(self, name: str) -> Any:
            assert "capabilit" not in name or name == "hardware_compatibility_level", f"tensorrt has no {name}"
            return getattr(self.real, name)

        def __setattr__(self, name: str, value: Any) -> None:
            assert name == "hardware_compatibility_level", f"tensorrt has no {name}"
            module.level = value

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.real = rtx.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def create_builder_config(self) -> Configuration:
            return Configuration(self.real.create_builder_config())

        def build_serialized_network(self, network: Any, config: Configuration) -> Any:
            return self.real.build_serialized_network(network, config.real)

    names = {name: getattr(rtx, name) for name in dir(rtx) if name != "ComputeCapability" and not name.startswith("_")}
    module = SimpleNamespace(**names | {"__name__": "tensorrt", "__version__": "10.14", "Builder": Builder})
    return module


@pytest.mark.parametrize("target", ["sm90", "current"])
def test_tensorrt_builds_for_every_card_of_a_generation_or_for_this_one(
    target: str, as_tensorrt: Any, tmp_path: Path
) -> None:
    shapes = [{"hidden_states": [n, 4]} for n in (1, 2, 4)]
    model = tiny_model(tmp_path / "model.onnx")
    engine = build_engine(as_tensorrt, model, targets=(target,), profiles=[shapes], stream_weights=True)
    assert engine.nbytes > 1000
    level = getattr(as_tensorrt, "level", None)
    same = as_tensorrt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert level == (None if target == "current" else same)


def test_a_builder_needs_a_gpu_for_weights_that_can_be_replaced(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    if card_here() is not None:
        pytest.skip("this machine has a GPU")
    shapes = [{"hidden_states": [n, 4]} for n in (1, 2, 4)]
    model = tiny_model(tmp_path / "model.onnx")
    with pytest.raises(FlcompressError, match=r"built no engine for sm89: .*(CUDA_SUCCESS|Cuda Runtime)"):
        build_engine(trt, model, targets=("sm89",), profiles=[shapes], refit=True)


class Refitting:
    """The objects of a refit: a file is "weights of X", and becomes "weights of Y"."""

    def __init__(self, *, missing: tuple[str, ...] = ()) -> None:
        self.flags: list[str] = []
        engine: Any = SimpleNamespace(
            content=b"",
            create_serialization_config=lambda: SimpleNamespace(set_flag=self.flags.append),
            serialize_with_config=lambda config: memoryview(engine.content),
        )

        def deserialize(content: Any) -> Any:
            engine.content = bytes(content)
            return engine

        def refit_from_file(path: str) -> bool:
            engine.content = b"weights of " + Path(path).name.encode()
            return not missing

        self.module = SimpleNamespace(
            __name__="tensorrt",
            __version__="10.14",
            Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
            Refitter=lambda engine, logger: SimpleNamespace(
                refit_cuda_engine=lambda: True, get_missing_weights=lambda: list(missing)
            ),
            OnnxParserRefitter=lambda refitter, logger: SimpleNamespace(refit_from_file=refit_from_file),
            SerializationFlag=SimpleNamespace(INCLUDE_REFIT="INCLUDE_REFIT"),
        )


@pytest.fixture
def no_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "log_into", lambda trt, errors: None)


def test_weights_are_replaced_and_can_be_again(tmp_path: Path, no_logger: None) -> None:
    (tmp_path / "model.engine").write_bytes(b"weights of a.onnx")
    objects = Refitting()
    built = refit_engine(objects.module, tmp_path / "model.engine", tmp_path / "b.onnx")
    assert bytes(built) == b"weights of b.onnx"
    assert objects.flags == ["INCLUDE_REFIT"]


def test_a_weight_that_is_missing_is_named(tmp_path: Path, no_logger: None) -> None:
    (tmp_path / "model.engine").write_bytes(b"weights of a.onnx")
    with pytest.raises(FlcompressError) as caught:
        refit_engine(Refitting(missing=("bias",)).module, tmp_path / "model.engine", tmp_path / "b.onnx")
    assert str(caught.value) == (
        f"{tmp_path / 'model.engine'}: TensorRT 10.14 did not replace its weights by those of {tmp_path / 'b.onnx'}: "
        "weight 'bias' is missing; remove the folder, then export again, which builds an engine"
    )


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with an H100, where an engine is a file of words; the list says how each was made."""
    made: list[str] = []

    def make(how: str) -> Callable[..., memoryview]:
        def engine(*args: Any, **options: Any) -> memoryview:
            made.append(how)
            return memoryview(f"{how} {len(made)}".encode())

        return engine

    module = SimpleNamespace(__name__="tensorrt", __version__="10.14")
    monkeypatch.setattr(exporting, "load_tensorrt", lambda name: module)
    monkeypatch.setattr(exporting, "card_here", lambda: HOPPER)
    monkeypatch.setattr(exporting, "runs_here", lambda targets: "sm90" in targets)
    monkeypatch.setattr(exporting, "build_engine", make("built"))
    monkeypatch.setattr(exporting, "refit_engine", make("refitted"))
    return made


def engine_export(**changes: Any) -> TensorRTExport:
    settings: dict[str, Any] = {"precision": None, "targets": ("sm90",), "profiles": (Profile(),), "module": "tensorrt"}
    return TensorRTExport(**{**settings, "stream_weights": False, "refit": True, **changes})


def test_the_same_graph_with_other_weights_takes_the_engine_of_before(
    run: Path, program: Program, on_hopper: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRTExport, "_checked", lambda self, program, engine, manifest, sizes: manifest)
    exports = tmp_path / "exports"
    shutil.copytree(run / "exports" / "onnx", exports / "onnx")

    def export(settings: TensorRTExport, program: Program = program) -> dict[str, Any]:
        work = exports / "work"
        work.mkdir()
        summary = settings.write(program, work, exports, silent)
        shutil.rmtree(exports / "tensorrt", ignore_errors=True)
        work.rename(exports / "tensorrt")
        manifest = json.loads((exports / "tensorrt" / "manifest.json").read_text())
        assert summary.get("refitted", False) == ("refitted" in manifest)
        return manifest  # type: ignore[no-any-return]

    first = export(engine_export())
    second = export(engine_export())
    assert (first["graph"], first["sha256"]) == (second["graph"], second["refitted"])
    export(engine_export(profiles=(Profile(batch=(1, 1, 2)),)))
    export(engine_export(stream_weights=True, profiles=(Profile(batch=(1, 1, 2)),)))
    export(engine_export(stream_weights=True, profiles=(Profile(batch=(1, 1, 2)),)))
    (exports / "tensorrt" / "model.engine").write_bytes(b"half")
    export(engine_export(stream_weights=True, profiles=(Profile(batch=(1, 1, 2)),)))
    export(engine_export(refit=False))
    assert on_hopper == ["built", "refitted", "built", "built", "refitted", "built", "built"]


def test_a_check_on_a_gpu_is_of_a_bounded_size(program: Program) -> None:
    small, usual = Size(batch=1, frames=3, height=8, width=8), Size(batch=2, frames=3, height=16, width=8)
    long = Size(batch=1, frames=21, height=60, width=104)
    assert checked_sizes(program, [[small, usual, long], [small, small, small]]) == [small, usual]
    assert checked_sizes(program, [[small, long, long]]) == [small]
    longer = replace(long, height=90)
    assert checked_sizes(program, [[longer, longer, longer], [long, longer, longer]]) == [long]


def test_an_engine_is_compared_with_torch_on_the_card(
    run: Path, program: Program, on_hopper: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is a CPU here, and ONNX Runtime the engine."""
    read: list[Any] = []

    def session(self: TensorRTBackend, folder: Path, manifest: dict[str, Any]) -> OnnxSession:
        read.append((folder / manifest["file"]).read_bytes())
        return OnnxSession(run / "exports" / "onnx" / "model.onnx", "cpu")

    monkeypatch.setattr(exporting, "DEVICE", "cpu")
    monkeypatch.setattr(exporting, "runs_here", lambda targets: True)
    monkeypatch.setattr(TensorRTBackend, "session", session)
    profiles = (Profile(batch=(1, 2, 4)), Profile(height=(32, 64, 64)))
    summary = engine_export(targets=("current",), profiles=profiles, refit=False).write(
        program, tmp_path, run / "exports", silent
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert read == [b"built 1"]
    assert summary["checked_on_gpu"] is manifest["checked_on_gpu"] is True
    assert 0.0 < manifest["difference"] < 1e-4 < manifest["tolerance"]
    assert manifest["checked"] == {"sizes": [[1, 3, 8, 8], [2, 3, 8, 8], [1, 3, 16, 8]]}
    assert manifest["card"] == {"name": HOPPER.name, "target": "sm90"}


@pytest.mark.gpu
def test_a_refitted_engine_agrees_with_torch(run: Path, program: Program, tmp_path: Path) -> None:
    """A real engine, built, then given the weights of another student, both compared with torch by the export."""
    if card_here() is None:
        pytest.skip("no CUDA driver")
    exporter = TensorRTExporter(targets=("current",), profiles=(Profile(batch=(1, 1, 3)),), refit=True)
    exporter.check()
    exports = tmp_path / "exports"
    shutil.copytree(run / "exports" / "onnx", exports / "onnx")
    (exports / "tensorrt").mkdir()
    assert not exporter.export(program, exports / "tensorrt", exports, silent)["refitted"]
    student = trained(program, tmp_path / "transformer")
    shutil.rmtree(exports / "onnx")
    (exports / "onnx").mkdir()
    OnnxExporter().export(student, exports / "onnx", exports, silent)
    (tmp_path / "work").mkdir()
    summary = exporter.export(student, tmp_path / "work", exports, silent)
    assert summary["refitted"]
    assert summary["checked_on_gpu"]
    assert tensorrt_session.runs_here(("current",))
