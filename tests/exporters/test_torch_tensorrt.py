"""What needs no Torch-TensorRT: refusals, and a graph cut into parts. Engines are built in tests/torch_tensorrt."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from flcompress.errors import RequestError, UnavailableError
from flcompress.exporters import torch_tensorrt_engines
from flcompress.exporters.onnx_graph.write import quiet
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.torch_tensorrt_build.build import shapes_of
from flcompress.exporters.torch_tensorrt_build.lowering import count_from_start, spread_copies
from flcompress.exporters.torch_tensorrt_build.parts import cut
from flcompress.exporters.torch_tensorrt_engines import TorchTensorRTExporter
from flcompress.runtime import torch_tensorrt_api, torch_tensorrt_session
from flcompress.runtime.backends.torch_tensorrt_backend import TorchTensorRTBackend
from flcompress.runtime.tensorrt_api import Card
from flcompress.runtime.torch_tensorrt_session import last_uses, require_builder, require_chain

BOTH = {"torch-tensorrt": "2.14.0", "torch-tensorrt-rtx": "2.14.0"}
RTX = {"torch-tensorrt-rtx": "2.14.0"}
STANDARD = {"torch-tensorrt": "2.14.0"}
ADA, HOPPER, TURING = Card("RTX 4090", "sm89"), Card("H100", "sm90"), Card("T4", "sm75")


def machine(monkeypatch: pytest.MonkeyPatch, packages: Mapping[str, str], card: Card | None) -> None:
    """Let these packages be installed, and this card be here."""

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(torch_tensorrt_api, "version", version)
    monkeypatch.setattr(torch_tensorrt_engines, "card_here", lambda: card)
    monkeypatch.setattr(torch_tensorrt_engines, "load_torch_tensorrt", lambda capability: None)


@pytest.mark.parametrize(
    ("packages", "card", "settings", "message"),
    [
        ({}, ADA, {}, r"torch-tensorrt: not installed; pip install 'flcompress\[torch-tensorrt-rtx\]'"),
        (BOTH, ADA, {}, "are both installed, into one folder; pip uninstall both"),
        (RTX, None, {}, r"targets: current given, but this machine has no CUDA driver; .* targets: \[sm89\]"),
        (STANDARD, None, {"targets": ("sm89",)}, r"sm89 given, but torch-tensorrt builds for the GPU of this machine"),
        (RTX, None, {"targets": ("sm89", "sm90")}, "torch-tensorrt-rtx does not build for sm90"),
        (RTX, HOPPER, {}, r"current given, but torch-tensorrt-rtx does not build for sm90; .*\[torch-tensorrt\]"),
        (STANDARD, TURING, {"precision": "bf16"}, "does not compute in bf16 .* set torch-tensorrt.precision: fp16"),
    ],
)
def test_what_cannot_be_built_here_is_refused_in_one_line(
    packages: dict[str, str], card: Card | None, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, packages, card)
    with pytest.raises(UnavailableError, match=message) as error:
        TorchTensorRTExporter(**settings).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("packages", "card", "settings"),
    [
        (RTX, None, {"targets": ("sm89", "sm120"), "precision": "bf16"}),
        (RTX, ADA, {}),
        (STANDARD, HOPPER, {"precision": "bf16", "engine": "block"}),
    ],
)
def test_what_can_be_built_here_passes(
    packages: dict[str, str], card: Card | None, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, packages, card)
    TorchTensorRTExporter(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ()}, "at least 1 item"),
        ({"targets": ("sm89", "sm89")}, "a target is given twice"),
        ({"targets": ("current", "sm89")}, "'current' must stand alone"),
        ({"engine": "layer"}, "'whole' or 'block'"),
        ({"profiles": (Profile(),), "precision": "fp8"}, "'fp32', 'fp16' or 'bf16'"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TorchTensorRTExporter(**settings)


def test_a_machine_that_cannot_run_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {}, None)
    monkeypatch.setattr(torch_tensorrt_session, "card_here", lambda: None)
    with pytest.raises(UnavailableError, match="torch-tensorrt: not installed"):
        TorchTensorRTBackend().require()
    machine(monkeypatch, RTX, None)
    with pytest.raises(UnavailableError, match=r"backend torch-tensorrt: no CUDA driver here, .* use --backend onnx"):
        TorchTensorRTBackend().require()


def manifest(**changes: Any) -> dict[str, Any]:
    """The parts of a manifest of two engines that a session reads before it loads them."""
    return {
        "sha256": {"model-000.engine": "0", "model-001.engine": "1"},
        "builder": {"name": "torch-tensorrt-rtx", "version": "2.14.0", "tensorrt": "1.6.1", "torch": "2.14.1"},
        "targets": ["sm89"],
        "engines": [
            {"file": "model-000.engine", "inputs": ["hidden_states", "timestep"], "outputs": ["inner.x"], "blocks": []},
            {"file": "model-001.engine", "inputs": ["inner.x", "timestep"], "outputs": ["sample"], "blocks": ["a"]},
        ],
        "inputs": [{"name": "hidden_states"}, {"name": "timestep"}],
    } | changes


def test_a_tensor_is_kept_until_its_last_use() -> None:
    assert last_uses(manifest()["engines"]) == {"hidden_states": 0, "timestep": 1, "inner.x": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [{"name": "hidden_states"}]}, "model-000.engine takes timestep, which nothing before it returns"),
        ({"engines": manifest()["engines"][:1]}, "no engine returns sample"),
        ({"engines": manifest()["engines"][1:]}, "model-001.engine takes inner.x, which nothing before it returns"),
        ({"sha256": {"model-000.engine": "0"}}, "it has no SHA-256 of model-001.engine"),
    ],
)
def test_a_manifest_that_does_not_fit_its_engines(changes: dict[str, Any], message: str) -> None:
    require_chain(manifest(), Path("export"))
    with pytest.raises(RequestError, match=rf"export: manifest.json does not fit its engines: {message}; export it"):
        require_chain(manifest(**changes), Path("export"))


def test_engines_of_another_builder_or_card() -> None:
    here = dict(manifest()["builder"])
    require_builder(manifest(), here | {"torch": "2.15.0"}, ADA)
    with pytest.raises(UnavailableError, match=r"built by torch-tensorrt-rtx 2.14.0 \(TensorRT 1.6.1\), and .* 1.7.0"):
        require_builder(manifest(), here | {"tensorrt": "1.7.0"}, ADA)
    with pytest.raises(UnavailableError, match=r"built for sm89, and the GPU here is sm90, H100; .*targets: \[sm90\]"):
        require_builder(manifest(), here, HOPPER)
    own = manifest(targets=["current"], card={"name": "H100", "target": "sm90"})
    require_builder(own, here, HOPPER)
    with pytest.raises(UnavailableError, match="built for sm90, and the GPU here is sm89"):
        require_builder(own, here, ADA)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        first, second = self.linear(x).reshape(x.shape[0], -1, 4, 2).split([3, 1], dim=2)
        return x + torch.cat((second, first), dim=2).reshape(x.shape) * scale


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        tokens = x.shape[1]
        hidden, scale = self.embed(x), timestep[:, None, None] / tokens
        for block in self.blocks:
            hidden = block(hidden, scale)
        result: Tensor = self.out(hidden).reshape(-1, tokens, 4)
        return result


class Wrapped(nn.Module):
    """As a `Denoiser` holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer()

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.transformer(**tensors)
        return result


def inputs(batch: int, tokens: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch * tokens)
    return {"x": torch.randn(batch, tokens, 4, generator=draw), "timestep": torch.rand(batch, generator=draw)}


@pytest.mark.parametrize("each_block", [False, True])
def test_parts_run_one_after_the_other_are_the_whole(each_block: bool) -> None:
    torch.manual_seed(0)
    model, auto = Wrapped().eval(), torch.export.Dim.AUTO
    shapes = {"x": {0: auto, 1: auto}, "timestep": {0: auto}}
    with quiet(), torch.no_grad():
        graph = torch.export.export(model, (inputs(2, 6),), dynamic_shapes=(shapes,), strict=False).module()
    parts = cut(graph, ["blocks.0", "blocks.1", "blocks.2"], each_block=each_block)
    blocks = (
        [(), *(("blocks.0",), ("blocks.1",), ("blocks.2",))] if each_block else [("blocks.0", "blocks.1", "blocks.2")]
    )
    assert [part.blocks for part in parts] == blocks
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for size in ((2, 6), (3, 4), (1, 5)):
        values: dict[Any, Any] = dict(zip(placeholders, inputs(*size).values(), strict=True))
        recorded = shapes_of(graph, inputs(*size))
        for part in parts:
            assert all(isinstance(values[node], Tensor) for node in part.inputs)
            values |= zip(part.outputs, part.module(*(values[node] for node in part.inputs)), strict=True)
        assert {node: list(tensor.shape) for node, tensor in values.items()}.items() <= recorded.items()
        (result,) = graph.graph.output_node().all_input_nodes
        assert torch.equal(values[result], model(inputs(*size)))


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0.0) & (x < 1.0)
        mask[:, 0] = True
        return mask


def test_what_is_copied_into_a_larger_tensor_is_expanded() -> None:
    x, auto = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.export.Dim.AUTO
    with quiet():
        program = torch.export.export(Masked(), (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
        graph = spread_copies(program.run_decompositions().module())
    copies = [node for node in graph.graph.nodes if node.target is torch.ops.aten.copy.default]
    assert copies
    for node in copies:
        target, source = (argument.meta["val"].shape for argument in node.args)
        assert target == source
    for given in (x, x[:3, :2]):
        assert torch.equal(graph(given), Masked()(given))


class Text(nn.Module):
    """The text's tokens, which stand last, and the clip's."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[:, -2:], x[:, :-2], x[:, :, -2:]


def test_a_slice_of_a_varying_axis_is_counted_from_its_start() -> None:
    x, auto = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)), torch.export.Dim.AUTO
    with quiet():
        program = torch.export.export(Text(), (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
        graph = count_from_start(program.run_decompositions().module())
    slices = [node.args[1:3] for node in graph.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    starts = {axis: [start for at, start in slices if at == axis and start != 0] for axis in (1, 2)}
    assert [type(start).__name__ for start in starts[1]] == ["Node"]
    assert starts[2] == [-2]
    for given in (x, x[:3, :4]):
        assert all(map(torch.equal, graph(given), Text()(given)))
