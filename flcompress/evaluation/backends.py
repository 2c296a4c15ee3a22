"""The ways a network is run for a bench, and what this machine is."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flcompress.diffusion.network import Conditioning, Network
from flcompress.models.network import as_network, missing_compiler

EAGER = "torch eager"
BACKENDS = (EAGER, "torch.compile", "ONNX Runtime")


class Unusable(Exception):  # noqa: N818 (no error: the bench goes on without this backend)
    """A backend cannot run here; the text says why."""


def compiled(model: Any) -> Network:
    """The model with its repeated blocks compiled (one compilation serves all blocks of a shape).

    Raises:
        Unusable: torch.compile needs a C++ compiler and Python's headers for the CPU, and they are not here.
    """
    if missing := missing_compiler():
        raise Unusable(missing)
    model.compile_repeated_blocks(dynamic=False)
    return as_network(model)


def onnx_network(path: Path) -> Network:
    """An exported denoiser behind ONNX Runtime, with as many threads as torch has.

    Raises:
        Unusable: there is no export, no ONNX Runtime, or its inputs are not those of a video transformer.
    """
    if not path.exists():
        raise Unusable(f"no {path}; add `- onnx` to the recipe's exports: or give flcompress export RUN --format onnx")
    if find_spec("onnxruntime") is None:
        raise Unusable("ONNX Runtime is not installed; pip install 'flcompress[onnxruntime]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    inputs = {given.name for given in session.get_inputs()}
    if inputs != set(names):
        raise Unusable(f"{path}: inputs {', '.join(sorted(inputs))}, expected {', '.join(names)}; export it again")

    def call(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
        tensors = {"hidden_states": x, "timestep": timestep, **given}
        return torch.from_numpy(session.run(None, {name: tensors[name].numpy() for name in names})[0])

    return call


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
