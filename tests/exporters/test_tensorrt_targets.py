"""Which builder makes an engine for which card, and what is refused before any work; no TensorRT is asked."""

from __future__ import annotations

import ctypes
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from flcompress.errors import UnavailableError
from flcompress.exporters import tensorrt_engine
from flcompress.exporters.tensorrt_build.profiles import require_precision
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.frontend.recipe import arguments
from flcompress.runtime import tensorrt_api
from flcompress.runtime.tensorrt_api import RTX_TARGETS, Card, card_here

ADA = Card("NVIDIA GeForce RTX 4090", "sm89")
HOPPER = Card("NVIDIA H100 80GB HBM3", "sm90")
TURING = Card("Tesla T4", "sm75")
BOTH = ("tensorrt", "tensorrt_rtx")


class Capability(Enum):
    """What an older TensorRT for RTX builds for."""

    NONE = 0
    CURRENT = 1
    SM80 = 80
    SM86 = 86
    SM89 = 89


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to be on a machine with a card and some builders."""

    def pretend(card: Card | None, *modules: str) -> None:
        monkeypatch.setattr(tensorrt_engine, "card_here", lambda: card)
        monkeypatch.setattr(tensorrt_api, "find_spec", lambda name: object() if name in modules else None)
        monkeypatch.setattr(
            tensorrt_engine,
            "load_tensorrt",
            lambda name: SimpleNamespace(__name__=name, __version__="1.2", ComputeCapability=Capability),
        )

    return pretend


@pytest.mark.parametrize(
    ("card", "modules", "targets", "module"),
    [
        (None, BOTH, ("sm89",), "tensorrt_rtx"),
        (HOPPER, BOTH, ("sm80", "sm89"), "tensorrt_rtx"),
        (HOPPER, BOTH, ("sm90",), "tensorrt"),
        (HOPPER, BOTH, ("current",), "tensorrt"),
        (ADA, BOTH, ("sm89",), "tensorrt_rtx"),
        (ADA, BOTH, ("current",), "tensorrt"),
        (ADA, ("tensorrt",), ("sm89",), "tensorrt"),
        (ADA, ("tensorrt_rtx",), ("current",), "tensorrt_rtx"),
    ],
)
def test_the_targets_choose_the_builder(
    card: Card | None, modules: tuple[str, ...], targets: Any, module: str, on: Any
) -> None:
    on(card, *modules)
    exporter = TensorRTExporter(targets=targets)
    exporter.check()
    assert exporter.module == module


def test_a_recipe_names_the_builder(on: Any) -> None:
    on(ADA, *BOTH)
    exporter = TensorRTExporter(targets=("sm89",), builder="tensorrt")
    exporter.check()
    assert exporter.module == "tensorrt"


@pytest.mark.parametrize(
    ("card", "modules", "given", "message"),
    [
        (
            HOPPER,
            ("tensorrt_rtx",),
            {"targets": ["sm90"]},
            "tensorrt: tensorrt is not installed, which builds for sm90; pip install 'flcompress[tensorrt]', or take "
            "'tensorrt' out of the recipe's exports",
        ),
        (
            HOPPER,
            ("tensorrt_rtx",),
            {"targets": ["current"]},
            "tensorrt: tensorrt is not installed, which builds for current (sm90, NVIDIA H100 80GB HBM3); pip install "
            "'flcompress[tensorrt]', or take 'tensorrt' out of the recipe's exports",
        ),
        (
            HOPPER,
            BOTH,
            {"targets": ["current"], "builder": "tensorrt-rtx"},
            "tensorrt.targets: current is sm90, NVIDIA H100 80GB HBM3, which tensorrt-rtx does not build for (it knows "
            "sm80, sm86, sm89, sm120, sm121); leave builder out and pip install 'flcompress[tensorrt]'",
        ),
        (
            ADA,
            BOTH,
            {"targets": ["sm90"]},
            "tensorrt.targets: sm90 given, but tensorrt builds for the GPU of this machine alone, and here that is "
            "sm89, NVIDIA GeForce RTX 4090; export it on a machine with that GPU, or name one that tensorrt-rtx builds "
            "for: sm80, sm86, sm89, sm120, sm121",
        ),
        (
            None,
            BOTH,
            {"targets": ["sm100"]},
            "tensorrt.targets: sm100 given, but tensorrt builds for the GPU of this machine alone, and here is none; "
            "export it on a machine with that GPU, or name one that tensorrt-rtx builds for: sm80, sm86, sm89, sm120, "
            "sm121",
        ),
        (
            None,
            (),
            {},
            "tensorrt: tensorrt_rtx is not installed, which builds for sm89; pip install 'flcompress[tensorrt-rtx]' "
            "(258 MB, builds engines without a GPU), or take 'tensorrt' out of the recipe's exports",
        ),
        (
            None,
            BOTH,
            {"targets": ["current"]},
            "tensorrt.targets: current given, but this machine has no CUDA driver; name the GPU that the engine is "
            "for, such as targets: [sm89]",
        ),
        (
            None,
            BOTH,
            {"targets": ["sm89", "sm121"]},
            "tensorrt.targets: sm121 given, TensorRT 1.2 knows current, sm80, sm86, sm89",
        ),
        (
            None,
            BOTH,
            {"refit": True},
            "tensorrt.refit: true given, but this machine has no CUDA driver, and an engine whose weights can be "
            "replaced is built with one only; leave refit out, or export on a machine with an NVIDIA GPU",
        ),
        (
            TURING,
            ("tensorrt",),
            {"targets": ["current"], "precision": "bf16"},
            "tensorrt.targets: current is sm75, Tesla T4, which does not compute in bf16 (GPUs from sm80 on do); set "
            "onnx.precision: fp16",
        ),
    ],
)
def test_what_cannot_be_built_here_is_refused_before_any_work(
    card: Card | None, modules: tuple[str, ...], given: dict[str, Any], message: str, on: Any
) -> None:
    on(card, *modules)
    with pytest.raises(UnavailableError) as caught:
        TensorRTExporter(**given).check()
    assert str(caught.value) == message


def test_a_precision_that_the_card_has(on: Any) -> None:
    require_precision("fp16", ("current",), TURING)
    require_precision("bf16", ("current",), HOPPER)
    require_precision("bf16", ("sm89",), TURING)  # the engine is for another card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": ["sm90"], "builder": "tensorrt-rtx"},
            "builder: tensorrt-rtx and targets: sm90 given, but it does not build for sm90; set builder: tensorrt",
        ),
        (
            {"targets": ["sm89", "sm90"]},
            "targets: sm89, sm90 given, but tensorrt builds for the GPU of one machine, and tensorrt-rtx for sm80, "
            "sm86, sm89, sm120, sm121 alone; name one target",
        ),
        (
            {"targets": ["sm86", "sm89"], "builder": "tensorrt"},
            "targets: sm86, sm89 given, but tensorrt builds for the GPU of one machine",
        ),
        ({"builder": "trtexec"}, "'tensorrt' or 'tensorrt-rtx'"),
    ],
)
def test_targets_that_no_builder_has(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TensorRTExporter(**arguments)


def test_what_decides_an_engine(on: Any) -> None:
    on(HOPPER, *BOTH)
    assert TensorRTExporter().fingerprint() == "tensorrt_rtx 1.2"
    assert TensorRTExporter(targets=("sm90",)).fingerprint() == "tensorrt 1.2"
    assert TensorRTExporter(targets=("current",)).fingerprint() == "tensorrt 1.2 sm90"


def test_new_arguments_at_their_default_leave_the_key_of_an_export_alone() -> None:
    assert set(arguments(TensorRTExporter())) == {"precision", "targets", "profiles"}
    changed = {"builder": "tensorrt-rtx", "stream_weights": True, "refit": True}
    given = arguments(TensorRTExporter(**changed))
    assert {key: given[key] for key in changed} == changed


@pytest.mark.e2e
def test_tensorrt_for_rtx_builds_for_these() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name.lower() for name in trt.ComputeCapability.__members__}
    assert "sm89" in known
    assert known - {"none", "current", "sm75"} <= set(RTX_TARGETS)


def test_the_card_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(value: int) -> Any:
        def call(place: Any, *_: Any) -> int:
            place._obj.value = value
            return 0

        return call

    def attribute(place: Any, number: int, device: Any) -> int:
        assert device.value == 11
        place._obj.value = {75: 9, 76: 0}[number]
        return 0

    def name(place: Any, length: int, device: Any) -> int:
        assert device.value == 11
        place.value = HOPPER.name.encode()[: length - 1]
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=write(2),
        cuDeviceGet=write(11),
        cuDeviceGetName=name,
        cuDeviceGetAttribute=attribute,
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda library: driver)
    assert card_here() == HOPPER
    driver.cuDeviceGetCount = write(0)
    assert card_here() is None
    driver.cuInit = lambda flags: 100  # CUDA_ERROR_NO_DEVICE
    assert card_here() is None
