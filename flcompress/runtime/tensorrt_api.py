"""The two TensorRTs: `tensorrt` for the card of this machine, TensorRT for RTX for cards that need not be here.

Their Python API is the same but for a few names, and neither runs an engine of the other.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from flcompress.errors import UnavailableError

Builder = Literal["tensorrt", "tensorrt-rtx"]
"""A package that builds engines, by the name of the extra that installs it."""

MODULES: dict[Builder, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The module of each, which is also its name in a manifest."""

RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""GPU generations that TensorRT for RTX builds for on any machine; it has no fp32 matrix product for Turing (sm75)."""

CURRENT: Final = "current"
"""The target that stands for the card of this machine."""

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True, slots=True)
class Card:
    """An NVIDIA GPU.

    Attributes:
        name: what its driver calls it, "NVIDIA H100 80GB HBM3".
        target: its generation, "sm90".
    """

    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.target}, {self.name}"


def card_here() -> Card | None:
    """Return the first GPU that processes see, or None without a CUDA driver. Asks the driver, not torch's build."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, device, major, minor = (ctypes.c_int(0) for _ in range(4))
    name = ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    if (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    ):
        return None
    return Card(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def cuda_driver() -> bool:
    """Return whether a CUDA driver with a device is here."""
    return card_here() is not None


def builder_for(targets: Sequence[str], card: Card | None) -> Builder:
    """Return the builder for some targets: of the card here the one that is installed, `tensorrt` of both.

    Args:
        targets: GPU generations, or "current" alone.
        card: the card of this machine.
    """
    wanted = [card.target if target == CURRENT and card else target for target in targets]
    if not set(wanted) <= {*RTX_TARGETS, CURRENT}:
        return "tensorrt"
    own = list(targets) == [CURRENT] or (card is not None and wanted == [card.target] and not installed("tensorrt-rtx"))
    return "tensorrt" if own and installed("tensorrt") else "tensorrt-rtx"


def installed(builder: Builder) -> bool:
    """Return whether a builder can be imported."""
    return find_spec(MODULES[builder]) is not None


def load_tensorrt(module: str) -> Any:
    """Return the module, "tensorrt" or "tensorrt_rtx", which is installed.

    Raises:
        UnavailableError: its libraries do not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        line = str(error).partition("\n")[0]
        raise UnavailableError(f"tensorrt: {module} is installed but does not import ({line}); reinstall it") from error


def capabilities(trt: Any, targets: Sequence[str], exporter: str = "tensorrt") -> list[Any]:
    """Return TensorRT for RTX's names of targets; UnavailableError for one that this version does not know."""
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name != "NONE"}
    for target in targets:
        if target not in known:
            raise UnavailableError(
                f"{exporter}.targets: {target} given, TensorRT {trt.__version__} knows {', '.join(known)}"
            )
    return [known[target] for target in targets]


def log_into(trt: Any, errors: list[str]) -> Any:
    """A TensorRT logger that collects error lines in `errors` and drops the rest."""

    class Collect(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(" ".join(message.split()))

    return Collect()
