"""Sessions of an engine, on stand-ins of the runtime's objects: without a GPU no engine runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flcompress.core.program import Program
from flcompress.errors import FlcompressError, UnavailableError
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.runtime import tensorrt_api, tensorrt_session
from flcompress.runtime.tensorrt_session import TensorRTSession
from tests.fixtures.exports import silent


class Context:
    """An execution context as TensorRT documents it: profile 0 at first, shapes outside the profile are refused, and
    another profile forgets the shapes that were set."""

    def __init__(self, shapes: list[Mapping[str, Any]]) -> None:
        self.shapes, self.profile = shapes, 0
        self.given: dict[str, tuple[int, ...]] = {}
        self.ran: list[int] = []
        self.switched: list[int] = []

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        self.profile, self.given = place, {}
        self.switched.append(place)
        return stream == 7

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self.shapes[self.profile]
        lows, highs = profile["min"][name], profile["max"][name]
        if any(not low <= one <= high for low, one, high in zip(lows, shape, highs, strict=True)):
            return False
        self.given[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.given["hidden_states"]

    def execute_async_v3(self, stream: int) -> bool:
        self.ran.append(self.profile)
        return set(self.given) == set(self.shapes[0]["min"]) and stream == 7


class Stream:
    cuda_stream = 7

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def built(run: Path, program: Program, tmp_path: Path) -> dict[str, Any]:
    """Manifest of a real engine of three profiles, which the real builder took."""
    try:
        tensorrt_api.load_tensorrt()
    except UnavailableError as error:
        pytest.skip(str(error))
    profiles = (Profile(batch=(1, 1, 1)), Profile(batch=(2, 2, 4)), Profile(height=(48, 48, 64)))
    TensorRTExporter(targets=("sm89",), profiles=profiles).export(program, tmp_path, run / "exports", silent)
    return dict(json.loads((tmp_path / "manifest.json").read_text()))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that seems to have a GPU; the list names the modules that were loaded."""
    loaded: list[str] = []
    monkeypatch.setattr(tensorrt_session, "require_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_session, "DEVICE", "cpu")
    monkeypatch.setattr(tensorrt_session, "log_into", lambda trt, errors: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    def loading(name: str) -> Any:
        loaded.append(name)

        def deserialize(content: bytes) -> Any:
            shapes = json.loads(content)
            names = [*shapes[0]["min"], "sample"]
            return SimpleNamespace(
                num_io_tensors=len(names),
                get_tensor_name=lambda place: names[place],
                create_execution_context=lambda: Context(shapes),
            )

        return SimpleNamespace(
            __version__="1.2", Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
        )

    monkeypatch.setattr(tensorrt_api, "importlib", SimpleNamespace(import_module=loading))
    monkeypatch.setattr(tensorrt_api, "find_spec", lambda name: object() if name == "tensorrt_rtx" else None)
    return loaded


def test_each_call_uses_the_first_profile_that_holds_its_inputs(
    built: dict[str, Any], runtime: list[str], tmp_path: Path
) -> None:
    assert len(built["shapes"]) == 3
    (tmp_path / "model.engine").write_text(json.dumps(built["shapes"]))
    session = TensorRTSession(tmp_path / "model.engine", built["builder"], built["shapes"])

    def call(batch: int, height: int) -> torch.Tensor:
        video, text = torch.zeros(batch, 16, 3, height // 4, 8), torch.zeros(batch, 16, 64)
        inputs = {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.zeros(batch)}
        return session({**inputs, "never looked at": torch.zeros(1)})

    for batch, height in ((1, 32), (4, 32), (3, 32), (1, 48), (1, 32)):
        assert call(batch, height).shape == (batch, 16, 3, height // 4, 8)
    assert (session.context.ran, session.context.switched) == ([0, 1, 1, 2, 0], [1, 2, 0])
    message = r"^engine: hidden_states \[5, 16, 3, 8, 8\], .*which none of its 3 profiles holds"
    with pytest.raises(FlcompressError, match=message):
        call(5, 32)


def test_the_module_that_built_an_engine_runs_it(
    runtime: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "find_spec", lambda name: object())  # both are installed
    (tmp_path / "model.engine").write_text('[{"min": {}, "max": {}}]')
    for name in ("tensorrt_rtx", "tensorrt"):
        TensorRTSession(tmp_path / "model.engine", {"name": name, "version": "1"}, [])
    assert runtime == ["tensorrt_rtx", "tensorrt"]


@pytest.mark.parametrize(
    ("name", "mend"),
    [("tensorrt", "pip install tensorrt"), ("tensorrt_rtx", "pip install 'flcompress[tensorrt-rtx]'")],
)
def test_a_module_that_is_not_installed_is_named(
    name: str, mend: str, runtime: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "find_spec", lambda one: object() if one != name else None)
    with pytest.raises(UnavailableError) as caught:
        TensorRTSession(tmp_path / "model.engine", {"name": name, "version": "1"}, [])
    assert str(caught.value) == (
        f"tensorrt: the engine was built by {name}, which is not installed, and no other runs it; {mend}"
    )
