"""The execution providers of ONNX Runtime: the package that has each, and whether one can run here."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from flcompress.errors import UnavailableError
from flcompress.runtime.tensorrt_api import cuda_driver

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]

PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""What ONNX Runtime calls each."""

EXTRAS: dict[Provider, str] = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "nv-tensorrt-rtx": "onnxruntime-rtx",
}
"""The extra of this package that installs it."""

RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The module of NVIDIA's provider, a library that plain ONNX Runtime loads."""

MISSING = (
    "ONNX Runtime is not installed, which checks and runs ONNX exports; pip install 'flcompress[onnxruntime]', or "
    "'flcompress[onnxruntime-gpu]' on a machine with an NVIDIA GPU, but not both"
)


def require_onnxruntime(what: str, provider: Provider | None = None) -> None:
    """Require one ONNX Runtime, and that the provider can run here.

    Args:
        what: begins the message.
        provider: what is asked for; None where any will do.

    Raises:
        UnavailableError: there is none, or there are two; or the provider's package, the driver or torch's CUDA lacks.
    """
    if find_spec("onnxruntime") is None:
        raise UnavailableError(f"{what}: {MISSING}")
    builds = installed_builds()
    if len(builds) > 1:
        wanted = provider or ("cuda" if cuda_driver() else "cpu")
        raise UnavailableError(
            f"{what}: {' and '.join(f'{name} {version(name)}' for name in builds)} are both installed, and pip unpacks "
            f"them into one folder, where each overwrites the other; pip uninstall {' '.join(builds)}, then pip "
            f"install 'flcompress[{EXTRAS[wanted]}]'"
        )
    if provider is not None and provider != "cpu":
        _require_gpu_provider(what, provider, builds)


def installed_builds() -> list[str]:
    """Names of the installed distributions that unpack into the folder `onnxruntime`."""
    return sorted(set(packages_distributions().get("onnxruntime", ())))


def best_provider() -> Provider:
    """Return CUDA where a driver is installed, and an ONNX Runtime and a torch built for it, else the CPU."""
    import torch

    return "cuda" if cuda_driver() and _has("cuda") and torch.cuda.is_available() else "cpu"


def rtx_devices() -> list[Any]:
    """The GPUs that NVIDIA's provider of TensorRT for RTX takes, as ONNX Runtime lists them."""
    import onnxruntime

    plugin = import_module(RTX_PLUGIN)
    name = plugin.get_ep_name()
    if not any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def provider_options(provider: Provider, precision: str, cache: Path | None) -> dict[str, str]:
    """Return what a provider is told; its own defaults for the rest.

    Args:
        provider: which.
        precision: of the export.
        cache: folder for what it builds from the graph; None: it builds anew in each process.
    """
    if provider == "cuda":
        # Its defaults try every convolution algorithm, compute fp32 in TF32 and double the arena with each allocation.
        return {
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
    if provider == "tensorrt":
        half = {f"trt_{precision}_enable": "1"} if precision in ("fp16", "bf16") else {}
        if cache is None:
            return half
        engine = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
        return half | engine | {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
    if provider == "nv-tensorrt-rtx" and cache is not None:
        return {"nv_runtime_cache_path": str(cache)}
    return {}


def _require_gpu_provider(what: str, provider: Provider, builds: list[str]) -> None:
    asked = f"{what}: provider {provider} given, but"
    if not _has(provider):
        plugin = provider == "nv-tensorrt-rtx"
        lacking = f"{RTX_PLUGIN} is not installed" if plugin else f"{_named(builds)} has no {PROVIDERS[provider]}"
        # NVIDIA's library is loaded by plain ONNX Runtime; what pip did not install, it does not remove.
        uninstall = (
            "" if not builds or (plugin and "onnxruntime" in builds) else f"pip uninstall {' '.join(builds)}, then "
        )
        raise UnavailableError(f"{asked} {lacking}; {uninstall}pip install 'flcompress[{EXTRAS[provider]}]'")
    if not cuda_driver():
        raise UnavailableError(
            f"{asked} this machine has no CUDA driver, and it runs on an NVIDIA GPU only; take --provider cpu, or run "
            "it on a machine with one"
        )
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            f"{asked} torch {torch.__version__} is built without CUDA, which holds the graph's inputs and output; "
            "install a CUDA build of torch"
        )


def _has(provider: Provider) -> bool:
    """Return whether the installed packages have the provider, whatever the machine."""
    if provider == "nv-tensorrt-rtx":
        return find_spec(RTX_PLUGIN) is not None
    import onnxruntime

    return PROVIDERS[provider] in onnxruntime.get_available_providers()


def _named(builds: list[str]) -> str:
    return " ".join(f"{name} {version(name)}" for name in builds) or "the installed ONNX Runtime"
