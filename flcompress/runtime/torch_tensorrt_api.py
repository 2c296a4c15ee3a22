"""The installed Torch-TensorRT: package `torch-tensorrt`, or `torch-tensorrt-rtx`, which builds for cards not here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flcompress.errors import UnavailableError
from flcompress.runtime.tensorrt_api import CURRENT

PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx")
RTX = PACKAGES[1]
"""The package whose TensorRT builds engines for cards that are not here."""


def installed_package() -> str:
    """Return the name of the installed package.

    Raises:
        UnavailableError: neither is installed, or both are, which share one module.
    """
    installed = [package for package in PACKAGES if _version(package) is not None]
    if not installed:
        raise UnavailableError(
            "torch-tensorrt: not installed; pip install 'flcompress[torch-tensorrt-rtx]' (builds without a GPU), or "
            "'flcompress[torch-tensorrt]' on a machine with a data-centre card, but not both"
        )
    if len(installed) > 1:
        raise UnavailableError(
            "torch-tensorrt: torch-tensorrt and torch-tensorrt-rtx are both installed, into one folder; pip uninstall "
            "both, then install the one that you want"
        )
    return installed[0]


def versions(torch_tensorrt: Any) -> dict[str, str]:
    """Return what built an engine, for its manifest: the package, and the versions that its engines depend on."""
    import tensorrt  # Torch-TensorRT's own name for either TensorRT
    import torch

    return {
        "name": installed_package(),
        "version": str(torch_tensorrt.__version__),
        "tensorrt": str(tensorrt.__version__),
        "torch": torch.__version__,
    }


def load_torch_tensorrt(capability: tuple[int, int] | None = None) -> Any:
    """Return the module.

    Args:
        capability: of the card that engines are built for, which stands in for a GPU where there is none.

    Raises:
        UnavailableError: not installed, or its libraries do not load.
    """
    package = installed_package()
    try:
        with stand_in(capability):
            return importlib.import_module("torch_tensorrt")
    # It raises a bare Exception where its TensorRT is missing.
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise UnavailableError(
            f"torch-tensorrt: {package} {version(package)} is installed but does not import ({line}); it needs the "
            "CUDA build of the torch that it was made for; reinstall both"
        ) from error


def capability_of(targets: Sequence[str]) -> tuple[int, int] | None:
    """Return the compute capability of the first target, (8, 9) for "sm89"; None for the card of this machine."""
    number = targets[0].removeprefix("sm")
    return None if targets[0] == CURRENT else (int(number[:-1]), int(number[-1]))


@contextmanager
def stand_in(capability: tuple[int, int] | None) -> Iterator[None]:
    """Answer for a card where Torch-TensorRT asks torch for the GPU: it does so even to import, and needs no more.

    Args:
        capability: the card's; None changes nothing.
    """
    import torch

    if capability is None or torch.cuda.is_available():
        yield
        return
    answers: dict[str, Any] = {"get_device_capability": lambda *_: capability, "current_device": lambda: 0}
    own = {name: getattr(torch.cuda, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield
    finally:
        for name, answer in own.items():
            setattr(torch.cuda, name, answer)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
