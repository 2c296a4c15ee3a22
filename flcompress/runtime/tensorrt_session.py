"""A serialized TensorRT engine, run on the GPU through torch's CUDA tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flcompress.errors import FlcompressError, UnavailableError
from flcompress.runtime.inputs import OUTPUT, Inputs, Shapes
from flcompress.runtime.tensorrt_api import cuda_driver, load_tensorrt, log_into

DEVICE = "cuda"


def require_gpu() -> None:
    """Raise UnavailableError, in one line, on a machine that cannot run an engine."""
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
    """Return whether an engine built for `targets` can be run, and so checked, on this machine."""
    if not (cuda_driver() and torch.cuda.is_available()):
        return False
    major, minor = torch.cuda.get_device_capability()
    return "current" in targets or f"sm{major}{minor}" in targets


class TensorRTSession:
    """An engine in memory; callable as a `flcompress.runtime.inputs.Session`."""

    def __init__(self, engine: Path, builder: Mapping[str, str], shapes: Sequence[Mapping[str, Shapes]]) -> None:
        """Deserialize the engine.

        Args:
            engine: the file.
            builder: "name" and "version" of the TensorRT that built it, as its manifest has them.
            shapes: for each profile, in the engine's order, every input's under "min" and "max".

        Raises:
            UnavailableError: no GPU, or not the TensorRT that built it.
            FlcompressError: TensorRT refuses the engine (built for another GPU, or by another version).
        """
        require_gpu()
        self.trt = load_tensorrt(builder["name"])
        self._profiles = shapes
        self.errors: list[str] = []
        self.runtime = self.trt.Runtime(log_into(self.trt, self.errors))
        self.engine = self.runtime.deserialize_cuda_engine(engine.read_bytes())
        if self.engine is None:
            reason = self.errors[-1] if self.errors else "no reason given"
            major, minor = torch.cuda.get_device_capability()
            raise FlcompressError(
                f"{engine}: TensorRT {self.trt.__version__} cannot load it on this GPU (sm{major}{minor}): {reason}; "
                f"it was built by {builder['name']} {builder['version']}; build it by this version, for this GPU with "
                "tensorrt.targets: [current]"
            )
        self.context = self.engine.create_execution_context()
        self._profile = 0  # a fresh context's

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Run the engine: named inputs to the predicted `sample`."""
        wanted = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)} - {OUTPUT}
        # What the traced forward never reads is no input of the engine.
        tensors = {name: tensor.detach().to(DEVICE).contiguous() for name, tensor in inputs.items() if name in wanted}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())  # the copies above
        self._use_profile({name: tuple(tensor.shape) for name, tensor in tensors.items()}, stream.cuda_stream)
        for name, tensor in tensors.items():
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise FlcompressError(f"engine: {name} {list(tensor.shape)} is outside the shapes it was built for")
            self.context.set_tensor_address(name, tensor.data_ptr())
        output = torch.empty(tuple(self.context.get_tensor_shape(OUTPUT)), device=DEVICE)
        self.context.set_tensor_address(OUTPUT, output.data_ptr())
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise FlcompressError(f"engine: it did not run: {self.errors[-1] if self.errors else 'no reason given'}")
        stream.synchronize()
        return output

    def _use_profile(self, input_shapes: Mapping[str, tuple[int, ...]], stream: int) -> None:
        """Have the context use the first profile that holds the inputs' shapes."""
        fitting = [index for index, shapes in enumerate(self._profiles) if _holds(shapes, input_shapes)]
        if not fitting:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in input_shapes.items())
            raise FlcompressError(
                f"engine: {sizes} given, which none of its {len(self._profiles)} profiles holds; generate at a size of "
                "tensorrt.profiles, or export it with another one"
            )
        if fitting[0] != self._profile:
            if not self.context.set_optimization_profile_async(fitting[0], stream):
                reason = self.errors[-1] if self.errors else "no reason given"
                raise FlcompressError(f"engine: its profile {fitting[0]} cannot be used: {reason}")
            self._profile = fitting[0]


def _holds(shapes: Mapping[str, Shapes], input_shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a profile takes inputs of these shapes."""
    return all(
        len(shape) == len(low)
        and all(least <= length <= most for least, length, most in zip(low, shape, high, strict=True))
        for name, shape in input_shapes.items()
        for low, high in [(shapes["min"][name], shapes["max"][name])]
    )
