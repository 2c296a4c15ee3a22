"""The suite `fvd`: distances in the features of a network of either kind, and networks that break its contract."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flcompress
from flcompress.clip_figures import Frames
from flcompress.core.suites import SuiteRequest
from flcompress.errors import RequestError
from flcompress.evaluation.suites.fvd import FrechetVideoDistance
from flcompress.models.parts import open_parts
from flcompress.moving_digits.dataset import build_moving_digits
from flcompress.progress import QuietDisplay
from tests.evaluation.conftest import make_run
from tests.fixtures.synthetic_clips import moving

WEIGHT = torch.randn(4, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0)) / 5.0


class Convolution(torch.nn.Module):
    """Features [n, 4] of clips: the mean of a random convolution over space and time, whose spread it has too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(WEIGHT.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv3d(x, self.weight, stride=2).relu().mean(dim=(2, 3, 4))


def torchscript(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.trace(Convolution(), torch.zeros(1, 3, 9, 32, 32))  # type: ignore[no-untyped-call]
        torch.jit.save(module, path)
    return path


def onnx_file(path: Path, size: tuple[int | str, int | str, int | str] = ("t", "h", "w"), *, flat: bool = True) -> Path:
    """The same network as ONNX; not `flat`: its output keeps axes of length 1."""
    import onnx
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["y"], keepdims=int(not flat)),
    ]
    entry = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, *size])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4] if flat else [1, 4, 1, 1, 1])
    constants = [numpy_helper.from_array(WEIGHT.numpy(), "w"), numpy_helper.from_array(np.array([2, 3, 4]), "axes")]
    graph = helper.make_graph(nodes, "features", [entry], [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def vector(path: Path, frames: Frames) -> np.ndarray[Any, np.dtype[np.float64]]:
    suite = FrechetVideoDistance()
    suite._file = path
    return suite._vector(frames)


def test_both_kinds_of_file_give_the_same_features(tmp_path: Path) -> None:
    clip = moving(frames=9, height=32, width=48)
    script, exported = vector(torchscript(tmp_path / "f.pt"), clip), vector(onnx_file(tmp_path / "f.onnx"), clip)
    assert script.shape == (4,)
    assert exported == pytest.approx(script, abs=1e-5)


def test_a_fixed_size_is_met(tmp_path: Path) -> None:
    """Seven frames of 16 x 16 of a clip that is longer and larger; of one that is shorter a line says so."""
    path = onnx_file(tmp_path / "f.onnx", (7, 16, 16))
    clip = moving(frames=9, height=32, width=48)
    assert vector(path, clip) == pytest.approx(vector(path, np.concatenate([clip[:7], clip[:2]])))
    with pytest.raises(RequestError, match=r"--features: .*f\.onnx: wants 7 frames, but clips have 5"):
        vector(path, clip[:5])


@pytest.mark.parametrize(
    ("make", "frames", "message"),
    [
        (
            lambda path: onnx_file(path / "f.onnx", flat=False),
            9,
            r"returns float32 \[1, 4, 1, 1, 1\] for float32 \[1, 3, 9",
        ),
        (
            lambda path: torchscript(path / "f.pt"),
            1,
            r"f\.pt: fails on float32 \[1, 3, 1, 32, 48\] \(.*\); a feature netw",
        ),
        (lambda path: path / "text.pt", 9, r"text\.pt: no TorchScript file \(.*\); expected one, or \.onnx"),
        (lambda path: path / "text.onnx", 9, r"text\.onnx: no ONNX model \("),
    ],
)
def test_a_network_that_breaks_the_contract_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], frames: int, message: str
) -> None:
    for name in ("text.pt", "text.onnx"):
        (tmp_path / name).write_text("no network")
    with pytest.raises(RequestError, match=message) as caught:
        vector(make(tmp_path), moving(frames=frames, height=32, width=48))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"--features: not given; the suite fvd needs an \.onnx file"),
        (Path("no.pt"), "--features: no.pt: no such file"),
    ],
)
def test_what_the_suite_needs_is_said(features: Path | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FrechetVideoDistance().evaluate(
            SuiteRequest(run=Path("run"), display=QuietDisplay(), own={"features": features})
        )


@pytest.mark.e2e
def test_distances_to_held_out_clips(model: Path, tmp_path: Path) -> None:
    (tmp_path / "encoded").mkdir()
    request = {"max_sequence_length": 16}
    build_moving_digits(tmp_path / "encoded", 16, open_parts(model), request, 0, lambda done, total, values: None)
    run = make_run(tmp_path, model, data="{latents: encoded}", stages=False)
    features = onnx_file(tmp_path / "features.onnx")
    suite: dict[str, Any] = {"suite": "fvd", "own": {"features": features}, "seeds": 2, "clips_per_prompt": 1}
    results = flcompress.evaluate(run, **suite, display=QuietDisplay())
    floor = results["floor"]["frechet_features"]["mean"]
    assert results["reference_clips"] == 4
    for row in results["contenders"]:
        assert row["frechet_features"]["mean"] > floor >= 0.0, "untrained models make noise"
    assert results["judge"]["weights"].keys() == {"features.onnx"}
    few = [line for line in results["warnings"] if line.startswith("note: ")]
    assert bool(few) is (results["prompts"] < 4), "fewer clips than features"
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(
        RequestError, match="--prompts: given with --suite fvd, which compares with real held-out clips"
    ):
        flcompress.evaluate(run, **suite, prompts=tmp_path / "prompts.txt", display=QuietDisplay())
