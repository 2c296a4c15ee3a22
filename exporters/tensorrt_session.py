"""A serialized TensorRT engine, run on the GPU through torch's CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flcompress.errors import FlcompressError, UnavailableError
from flcompress.exporters.arguments import OUTPUT
from flcompress.exporters.parity import Inputs
from flcompress.exporters.tensorrt_api import cuda_driver, load_tensorrt, log_into


def require_gpu() -> None:
    """UnavailableError, in one line, on a machine that cannot run an engine."""
    if not cuda_driver():
        raise UnavailableError(
            "backend tensorrt: no CUDA driver here, and an engine runs on an NVIDIA GPU only; use --backend onnx or "
            "--backend torch, or run it on a machine with one"
        )
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"backend tensorrt: torch {torch.__version__} is built without CUDA, which holds the engine's tensors; "
            "install a CUDA build of torch"
        )


def runs_here(targets: Sequence[str]) -> bool:
    """Whether an engine built for `targets` can be run, and so checked, on this machine."""
    if not (cuda_driver() and torch.cuda.is_available()):
        return False
    major, minor = torch.cuda.get_device_capability()
    return "current" in targets or f"sm{major}{minor}" in targets


class TensorRTSession:
    """Callable as a `flcompress.exporters.parity.Denoiser`."""

    def __init__(self, engine: Path) -> None:
        """Deserialize the engine.

        Raises:
            UnavailableError: no GPU, or no TensorRT.
            FlcompressError: TensorRT refuses the engine (built for another GPU, or by another version).
        """
        require_gpu()
        self.trt = load_tensorrt()
        self.errors: list[str] = []
        self.runtime = self.trt.Runtime(log_into(self.trt, self.errors))
        self.engine = self.runtime.deserialize_cuda_engine(engine.read_bytes())
        if self.engine is None:
            reason = self.errors[-1] if self.errors else "no reason given"
            major, minor = torch.cuda.get_device_capability()
            raise FlcompressError(
                f"{engine}: TensorRT {self.trt.__version__} cannot load it on this GPU (sm{major}{minor}): {reason}; "
                "build it for this GPU with tensorrt.targets: [current]"
            )
        self.context = self.engine.create_execution_context()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        given = {name: tensor.detach().cuda().contiguous() for name, tensor in inputs.items()}
        wanted = {self.engine.get_tensor_name(place) for place in range(self.engine.num_io_tensors)} - {OUTPUT}
        for name, tensor in given.items():
            if name not in wanted:  # the traced forward never looks at it
                continue
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise FlcompressError(f"engine: {name} {list(tensor.shape)} is outside the shapes it was built for")
            self.context.set_tensor_address(name, tensor.data_ptr())
        output = torch.empty(tuple(self.context.get_tensor_shape(OUTPUT)), device="cuda")
        self.context.set_tensor_address(OUTPUT, output.data_ptr())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())  # the copies above
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise FlcompressError(f"engine: it did not run: {self.errors[-1] if self.errors else 'no reason given'}")
        stream.synchronize()
        return output
