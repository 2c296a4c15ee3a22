"""Real engines, built by Torch-TensorRT without a GPU; `make test-torch-tensorrt` runs these in an environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flcompress.errors import FlcompressError, UnavailableError
from flcompress.exporters.shared import TOLERANCES
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.torch_tensorrt_build.lowering import require_converters
from flcompress.exporters.torch_tensorrt_engines import TorchTensorRTExporter
from flcompress.files import sha256
from flcompress.runtime.tensorrt_api import card_here
from flcompress.runtime.torch_tensorrt_api import RTX, installed_package, load_torch_tensorrt, stand_in
from flcompress.runtime.torch_tensorrt_session import TorchTensorRTSession, require_chain
from tests.families.exports import exportable
from tests.torch_tensorrt.parts_in_torch import watched

pytestmark = pytest.mark.e2e

FAMILIES = ("wan", "hunyuan-video", "cogvideox", "ltx", "flux")
ADA = (8, 9)


@pytest.fixture(scope="module", autouse=True)
def torch_tensorrt() -> Any:
    try:
        if installed_package() != RTX:
            pytest.skip(f"{RTX} builds for cards that are not here, torch-tensorrt does not")
    except UnavailableError as error:
        pytest.skip(str(error))
    return load_torch_tensorrt(ADA)


def silent(done: int, total: int, values: object) -> None:
    assert 0 <= done <= total


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    """Note operators whose result has another type in the engine than in torch: (there, here).

    Not of fp64, which TensorRT lacks, and of counts, whose sum it writes in fp32.
    """
    from torch_tensorrt import dtype
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    different: dict[str, tuple[Any, Any]] = {}
    own = TRTInterpreter.run_node

    def run_node(self: Any, node: Any) -> Any:
        result = own(self, node)
        if hasattr(result, "is_network_input") and isinstance(node.meta.get("val"), torch.Tensor):
            there, here = dtype._from(result.dtype).to(torch.dtype), node.meta["val"].dtype
            wider = there == torch.float32 and here in (torch.float64, torch.int32, torch.int64)
            if there != here and not wider:
                different[str(node)] = there, here
        return result

    monkeypatch.setattr(TRTInterpreter, "run_node", run_node)
    return different


@pytest.mark.parametrize(("name", "precision"), [*((name, "bf16") for name in FAMILIES), ("wan", "fp16")])
def test_a_whole_transformer_becomes_one_engine_of_varying_sizes(
    name: str, precision: Any, tmp_path: Path, types: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = exportable(name, tmp_path)
    sides = {} if name == "flux" else {"height": (32, 32, 64)}
    profiles = (Profile(batch=(1, 1, 2)), Profile(batch=(1, 1, 1), **sides))
    exporter = TorchTensorRTExporter(precision=precision, targets=("sm89", "sm120"), profiles=profiles)
    exporter.check()
    parts = watched(program, precision, monkeypatch)
    folder = tmp_path / "export"
    folder.mkdir()
    summary = exporter.export(program, folder, tmp_path, silent)
    assert (summary["engines"], summary["in_torch"], summary["checked_on_gpu"]) == (1, [], card_here() is not None)
    manifest = json.loads((folder / "manifest.json").read_text())
    engine = folder / "model.engine"
    assert manifest["sha256"] == {"model.engine": sha256(engine)}
    assert manifest["bytes"] == engine.stat().st_size > 100_000
    assert manifest["builder"]["name"] == RTX
    assert manifest["engines"][0]["blocks"] == [block.path for block in program.graph.blocks]
    assert [len(manifest[key]) for key in ("profiles", "shapes")] == [2, 2]
    assert manifest["outputs"][0]["shape"][0] == "batch"
    assert manifest["timesteps"] == list(program.contract.timesteps)
    assert manifest["contract"] == json.loads(json.dumps(program.contract.to_dict()))
    assert {tensor["dtype"] for tensor in manifest["inputs"]} <= {"float32", "int64", "int32", "bool"}
    assert types == {}
    assert parts.difference() <= TOLERANCES[precision]


BLOCKS = [("wan", "fp16"), ("wan", "bf16"), *((name, "fp32") for name in FAMILIES[1:])]


@pytest.mark.parametrize(("name", "precision"), BLOCKS)
def test_a_block_becomes_an_engine(
    name: str, precision: Any, tmp_path: Path, types: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = exportable(name, tmp_path)
    parts = watched(program, precision, monkeypatch)
    folder = tmp_path / "export"
    folder.mkdir()
    exporter = TorchTensorRTExporter(precision=precision, engine="block", targets=("sm89",))
    summary = exporter.export(program, folder, tmp_path, silent)
    manifest = json.loads((folder / "manifest.json").read_text())
    require_chain(manifest, folder)
    blocks = [block.path for block in program.graph.blocks]
    assert [path for engine in manifest["engines"] for path in engine["blocks"]] == blocks
    assert all(len(engine["blocks"]) <= 1 for engine in manifest["engines"])
    assert summary["engines"] == len(manifest["engines"]) in (len(blocks), len(blocks) + 1)
    assert sorted(manifest["sha256"]) == sorted(path.name for path in folder.glob("*.engine"))
    assert (types, summary["in_torch"]) == ({}, [])
    assert parts.difference() <= TOLERANCES[precision]


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Sequential(nn.Linear(4, 4), Eigenvalues())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.transformer(x)
        return result


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.linalg.eigvalsh(x)
        return result


def test_an_operator_without_a_converter_is_named_with_its_module(torch_tensorrt: Any) -> None:
    graph = torch.export.export(Unknown(), (torch.eye(4),), strict=False).module(check_guards=False)
    settings = torch_tensorrt.dynamo.CompilationSettings(device=torch_tensorrt.Device(gpu_id=0))
    with pytest.raises(FlcompressError, match=r"torch-tensorrt: aten.linalg_eigvalsh.default of '1' has no converter"):
        require_converters(graph, settings)


def test_without_a_gpu_a_session_is_refused(tmp_path: Path) -> None:
    if card_here() is not None:
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(UnavailableError, match="backend torch-tensorrt: no CUDA driver here"):
        TorchTensorRTSession(tmp_path, {})


def test_torch_is_left_as_it_was() -> None:
    before = torch.cuda.get_device_capability, torch.cuda.current_device
    with stand_in(ADA):
        assert torch.cuda.get_device_capability() == ADA or torch.cuda.is_available()
    assert before == (torch.cuda.get_device_capability, torch.cuda.current_device)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["whole", "block"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engines_agree_with_torch(name: str, precision: Any, engine: Any, tmp_path: Path) -> None:
    if card_here() is None:
        pytest.skip("no CUDA driver")
    program = exportable(name, tmp_path)
    folder = tmp_path / "export"
    folder.mkdir()
    profiles = (Profile(), Profile(batch=(1, 2, 2)))
    exporter = TorchTensorRTExporter(precision=precision, engine=engine, targets=("current",), profiles=profiles)
    summary = exporter.export(program, folder, tmp_path, silent)
    assert summary["checked_on_gpu"]
    assert summary["difference"] <= json.loads((folder / "manifest.json").read_text())["tolerance"]
