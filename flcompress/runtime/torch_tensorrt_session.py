"""Engines that Torch-TensorRT built, run one after the other by its runtime, on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.runtime.inputs import OUTPUT, Inputs, Shapes
from flcompress.runtime.tensorrt_api import CURRENT, Card, card_here
from flcompress.runtime.tensorrt_session import DEVICE, profile_for, require_gpu
from flcompress.runtime.torch_tensorrt_api import load_torch_tensorrt, versions


class TorchTensorRTSession:
    """The engines of an export in memory; callable as a `flcompress.runtime.inputs.Session`."""

    device = DEVICE

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Load the engines.

        Args:
            folder: the export's.
            manifest: the content of its manifest.

        Raises:
            UnavailableError: no GPU, or not the Torch-TensorRT or the GPU that they were built for.
            FlcompressError: its runtime refuses an engine.
            RequestError: the manifest does not fit its engines.
        """
        require_gpu("torch-tensorrt")
        torch_tensorrt = require_runnable(manifest, folder)
        self._profiles: Sequence[Mapping[str, Shapes]] = manifest["shapes"]
        self._engines = [(_load(torch_tensorrt, folder, engine), engine) for engine in manifest["engines"]]
        self._inputs = {spec["name"] for spec in manifest["inputs"]}
        self._last = last_uses(manifest["engines"])

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the engines: named inputs to the predicted `sample`."""
        # What the traced forward never reads is no input of an engine.
        tensors = {name: tensor.detach().to(DEVICE) for name, tensor in inputs.items() if name in self._inputs}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        profile = profile_for(self._profiles, shapes, "torch-tensorrt")
        for number, (module, engine) in enumerate(self._engines):
            if len(self._profiles) > 1:
                module.set_optimization_profile(profile)
            results = module(*(tensors[name] for name in engine["inputs"]))
            tensors |= zip(engine["outputs"], results if isinstance(results, tuple) else (results,), strict=True)
            for name in [name for name in tensors if self._last.get(name, number) <= number and name != OUTPUT]:
                del tensors[name]
        return tensors[OUTPUT]


def require_runnable(manifest: Mapping[str, Any], folder: Path) -> Any:
    """Return the module of Torch-TensorRT, which runs the engines of a manifest here; see `TorchTensorRTSession`."""
    require_chain(manifest, folder)
    torch_tensorrt, card = load_torch_tensorrt(), card_here()
    if card is not None:
        require_builder(manifest, versions(torch_tensorrt), card)
    return torch_tensorrt


def last_uses(engines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return tensor -> number of the last engine that reads it."""
    return {name: number for number, engine in enumerate(engines) for name in engine["inputs"]}


def require_chain(manifest: Mapping[str, Any], folder: Path) -> None:
    """Raise RequestError unless a manifest's engines have their inputs when they run, and return `sample`."""
    known = {spec["name"] for spec in manifest["inputs"]}
    fault = ""
    for engine in manifest["engines"]:
        missing = [name for name in engine["inputs"] if name not in known]
        fault = fault or (f"{engine['file']} takes {missing[0]}, which nothing before it returns" if missing else "")
        known |= set(engine["outputs"])
    fault = fault or ("" if OUTPUT in known else f"no engine returns {OUTPUT}")
    unknown = [engine["file"] for engine in manifest["engines"] if engine["file"] not in manifest["sha256"]]
    fault = fault or (f"it has no SHA-256 of {unknown[0]}" if unknown else "")
    if fault:
        raise RequestError(f"{folder}: manifest.json does not fit its engines: {fault}; export it again")


def require_builder(manifest: Mapping[str, Any], here: Mapping[str, str], card: Card) -> None:
    """Raise UnavailableError unless the engines of a manifest run on this machine.

    Args:
        manifest: the export's.
        here: the installed package and versions; see `versions`.
        card: the GPU here.
    """
    builder = manifest["builder"]
    if (builder["name"], builder["tensorrt"]) != (here["name"], here["tensorrt"]):
        raise UnavailableError(
            f"torch-tensorrt: the engines were built by {builder['name']} {builder['version']} (TensorRT "
            f"{builder['tensorrt']}), and {here['name']} {here['version']} (TensorRT {here['tensorrt']}) is installed, "
            f"which does not run them; export again, or pip install {builder['name']}=={builder['version']}"
        )
    own = manifest.get("card", {}).get("target", CURRENT)
    targets = [own if name == CURRENT else name for name in manifest["targets"]]
    if CURRENT not in targets and card.target not in targets:
        raise UnavailableError(
            f"torch-tensorrt: the engines were built for {', '.join(targets)}, and the GPU here is {card}; export "
            f"again with torch-tensorrt.targets: [{card.target}]"
        )


def _load(torch_tensorrt: Any, folder: Path, engine: Mapping[str, Any]) -> Any:
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    file = folder / engine["file"]
    try:
        return TorchTensorRTModule(
            file.read_bytes(),
            input_binding_names=list(engine["inputs"]),
            output_binding_names=list(engine["outputs"]),
            name=file.stem,
            settings=CompilationSettings(device=torch_tensorrt.Device(gpu_id=torch.cuda.current_device())),
        )
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise FlcompressError(f"{file}: Torch-TensorRT cannot load it on this GPU: {line}; export it again") from error
