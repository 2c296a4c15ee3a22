"""The installed TensorRT: `tensorrt` if it can be imported, else `tensorrt_rtx`, whose Python API is the same."""

from __future__ import annotations

import ctypes
import importlib
import sys
from importlib.util import find_spec
from typing import Any

from flcompress.errors import UnavailableError

MODULES = ("tensorrt", "tensorrt_rtx")
MISSING = (
    "tensorrt: neither tensorrt nor tensorrt_rtx is installed; pip install 'flcompress[tensorrt-rtx]' (258 MB, builds "
    "engines without a GPU), or take 'tensorrt' out of the recipe's exports"
)

_INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt_rtx": "pip install 'flcompress[tensorrt-rtx]'"}


def load_tensorrt(builder: str | None = None) -> Any:
    """Return the TensorRT module.

    Args:
        builder: the one that built an engine, which alone can run it; any where None.

    Raises:
        UnavailableError: it is not installed, or its libraries do not load.
    """
    if builder is not None and (builder not in MODULES or find_spec(builder) is None):
        raise UnavailableError(
            f"tensorrt: the engine was built by {builder}, which is not installed, and no other runs it; "
            f"{_INSTALL.get(builder, 'export it again')}"
        )
    for name in MODULES if builder is None else (builder,):
        if find_spec(name) is None:
            continue
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            line = str(error).partition("\n")[0]
            raise UnavailableError(
                f"tensorrt: {name} is installed but does not import ({line}); reinstall it"
            ) from error
    raise UnavailableError(MISSING)


def builds_for_others(trt: Any) -> bool:
    """Return whether this TensorRT builds engines for GPUs that are not here (TensorRT for RTX does)."""
    return hasattr(trt, "ComputeCapability")


def cuda_driver() -> bool:
    """Return whether a CUDA driver with a device is here. Asks the driver itself, not torch's build of it."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def log_into(trt: Any, errors: list[str]) -> Any:
    """A TensorRT logger that collects error lines in `errors` and drops the rest."""

    class Collect(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(" ".join(message.split()))

    return Collect()
