"""An exported ONNX denoiser, run by ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from flcompress.errors import RequestError, UnavailableError
from flcompress.runtime.inputs import Inputs
from flcompress.runtime.tensorrt_api import cuda_driver

MISSING = (
    "ONNX Runtime is not installed, which checks and runs ONNX exports; pip install 'flcompress[onnxruntime]', or "
    "'flcompress[onnxruntime-gpu]' on a machine with an NVIDIA GPU, but not both"
)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def require_onnxruntime(what: str) -> None:
    """Raise UnavailableError, in one line that begins with `what`, where ONNX Runtime is not installed."""
    if find_spec("onnxruntime") is None:
        raise UnavailableError(f"{what}: {MISSING}")


def best_provider() -> Literal["cpu", "cuda"]:
    """Return the GPU where both a driver and an ONNX Runtime built for it are installed, else the CPU."""
    import onnxruntime

    return "cuda" if cuda_driver() and PROVIDERS["cuda"] in onnxruntime.get_available_providers() else "cpu"


class OnnxSession:
    """An ONNX model in memory; callable as a `flcompress.runtime.inputs.Session`.

    Attributes:
        device: the execution provider that runs it.
    """

    def __init__(self, model: Path, device: Literal["cpu", "cuda"] = "cpu", *, lean: bool = False) -> None:
        """Load `model` (its external data next to it).

        Args:
            model: the file.
            device: what runs it.
            lean: hold no second copy of the weights: slower, for a check of a large model.

        Raises:
            UnavailableError: ONNX Runtime did not take the device (it falls back to the CPU silently), or lacks kernels
                for the graph there, as for bf16 on a CPU.
        """
        import onnxruntime

        self._model = model
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as torch has, so that the two compare fairly
        options.log_severity_level = 3  # errors; what else it says is about its own optimiser
        if lean:  # else fp16 weights become fp32 ones ahead of the run, all at once, and stay
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        wanted = PROVIDERS[device]
        # A provider this build lacks is left out of the list here, because ONNX Runtime would only warn about it.
        chosen = [name for name in (wanted, PROVIDERS["cpu"]) if name in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(model), options, providers=list(dict.fromkeys(chosen)))
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise UnavailableError(
                f"{model}: ONNX Runtime has no kernels for it on {wanted} ({' '.join(str(error).split())}); run it on "
                "an NVIDIA GPU with 'flcompress[onnxruntime-gpu]', or export it with onnx.precision: fp32"
            ) from error
        self.device = str(self.session.get_providers()[0])
        if self.device != wanted:
            raise UnavailableError(
                f"{model}: ONNX Runtime runs it on {self.device}, {wanted} was asked for; "
                "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'flcompress[onnxruntime-gpu]', and check "
                "the CUDA libraries"
            )

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Run the graph: named inputs to the predicted `sample`."""
        # What the traced forward never reads is no input of the graph.
        arrays = {spec.name: inputs[spec.name].detach().cpu().numpy() for spec in self.session.get_inputs()}
        for spec in self.session.get_inputs():
            shape = arrays[spec.name].shape
            if any(isinstance(axis, int) and axis != n for axis, n in zip(spec.shape, shape, strict=True)):
                raise RequestError(
                    f"{self._model}: {spec.name} {list(shape)} given, but the graph takes {spec.shape}; choose the "
                    "size that it was exported at"
                )
        return torch.from_numpy(self.session.run(None, arrays)[0])
