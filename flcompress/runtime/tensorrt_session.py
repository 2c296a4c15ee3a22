"""A serialized TensorRT engine, run on the GPU through torch's CUDA tensors."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.files import replacing
from flcompress.runtime.inputs import OUTPUT, Inputs, Shapes
from flcompress.runtime.tensorrt_api import (
    CURRENT,
    MODULES,
    Card,
    card_here,
    cuda_driver,
    installed,
    load_tensorrt,
    log_into,
)

DEVICE = "cuda"

CACHE_SUFFIX = ".cache"
"""Suffix, after the engine's name, of the file of kernels that TensorRT for RTX compiled when it ran the engine."""

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""A manifest's type of a tensor -> TensorRT's name of it."""


def require_gpu(backend: str = "tensorrt") -> None:
    """Raise UnavailableError, in one line, on a machine that cannot run an engine."""
    if not cuda_driver():
        raise UnavailableError(
            f"backend {backend}: no CUDA driver here, and an engine runs on an NVIDIA GPU only; use --backend onnx or "
            "--backend torch, or run it on a machine with one"
        )
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"backend {backend}: torch {torch.__version__} is built without CUDA, which holds the engine's tensors; "
            "install a CUDA build of torch"
        )


def runs_here(targets: Sequence[str]) -> bool:
    """Return whether an engine built for `targets` can be run, and so checked, on this machine."""
    card = card_here()
    return card is not None and torch.cuda.is_available() and (CURRENT in targets or card.target in targets)


def require_builder(manifest: Mapping[str, Any], card: Card | None) -> Any:
    """Return the TensorRT module that built an engine, before its file is read.

    Args:
        manifest: the engine's.
        card: the GPU that is to run it.

    Raises:
        UnavailableError: another TensorRT, another version of it or another GPU is here.
    """
    name, version = manifest["builder"]["name"], manifest["builder"]["version"]
    extras = {module: extra for extra, module in MODULES.items()}
    if name not in extras or not installed(extras[name]):
        fix = f"pip install 'flcompress[{extras[name]}]'" if name in extras else "export it again"
        raise UnavailableError(
            f"tensorrt: the engine was built by {name}, which is not installed, and no other runs it; {fix}"
        )
    trt = load_tensorrt(name)
    if trt.__version__ != version:
        raise UnavailableError(
            f"tensorrt: the engine was built by {name} {version}, and {trt.__version__} is installed, which does not "
            f"run it; export it again, or pip install {name}=={version}"
        )
    targets = [manifest.get("card", {}).get("target", CURRENT) if t == CURRENT else t for t in manifest["targets"]]
    if card is not None and CURRENT not in targets and card.target not in targets:
        raise UnavailableError(
            f"tensorrt: the engine was built for {', '.join(targets)}, and the GPU here is {card}; export it again "
            f"with tensorrt.targets: [{card.target}]"
        )
    return trt


def deserialize(trt: Any, runtime: Any, engine: Path, errors: Sequence[str]) -> Any:
    """Return an engine; FlcompressError with TensorRT's reason, the last of `errors`, where it refuses the file."""
    # Mapped: an engine is as large as the weights, and would be in host memory a second time.
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        loaded = runtime.deserialize_cuda_engine(content)
    if loaded is None:
        raise FlcompressError(
            f"{engine}: {trt.__name__} {trt.__version__} cannot load it on this GPU ({card_here()}): "
            f"{errors[-1] if errors else 'no reason given'}; export it again on this machine"
        )
    return loaded


class TensorRTSession:
    """An engine in memory; callable as a `flcompress.runtime.inputs.Session`.

    Every profile that a call needs gets an execution context, which is kept with its buffers: an input that is the
    tensor of the call before is not copied again. Nothing waits for the GPU.
    """

    device = DEVICE

    def __init__(self, engine: Path, manifest: Mapping[str, Any], *, cuda_graph: bool = False) -> None:
        """Deserialize the engine.

        Args:
            engine: the file.
            manifest: the content of its manifest.
            cuda_graph: launch each call as one CUDA graph, captured at the second call with the same shapes.

        Raises:
            UnavailableError: no GPU, or not the TensorRT or the GPU that it was built for.
            FlcompressError: TensorRT refuses the engine.
            RequestError: the manifest describes another engine.
        """
        require_gpu()
        self._trt = require_builder(manifest, card_here())
        self._errors: list[str] = []
        self._runtime = self._trt.Runtime(log_into(self._trt, self._errors))
        self._engine = deserialize(self._trt, self._runtime, engine, self._errors)
        self._profiles: Sequence[Mapping[str, Shapes]] = manifest["shapes"]
        self._dtypes = {spec["name"]: spec["dtype"] for spec in (*manifest["inputs"], *manifest["outputs"])}
        require_bindings(self._engine, manifest, engine)
        _set_weight_budget(self._engine)
        self._rtx = self._trt.__name__ == MODULES["tensorrt-rtx"]
        self._cuda_graph = cuda_graph
        self._cache = _Cache(self._engine, engine.with_name(engine.name + CACHE_SUFFIX)) if self._rtx else None
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._contexts: dict[int, _Context] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the engine: named inputs to the predicted `sample`."""
        # What the traced forward never reads is no input of the engine.
        tensors = {name: tensor for name, tensor in inputs.items() if name in self._dtypes}
        index = profile_for(self._profiles, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if index not in self._contexts:
            self._contexts[index] = self._context(index)
        return self._contexts[index](tensors)

    def _context(self, index: int) -> _Context:
        """Return a new execution context with a profile, whose memory is what that profile needs."""
        allocation = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._cache is None:
            context = self._engine.create_execution_context(allocation)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(allocation)
            config.set_runtime_cache(self._cache.kernels)
            if self._cuda_graph:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
            reason = self._errors[-1] if self._errors else "no reason given"
            raise FlcompressError(f"engine: its profile {index} cannot be used: {reason}")
        capture = self._cuda_graph and self._cache is None  # TensorRT for RTX captures by itself
        return _Context(context, self._stream, self._dtypes, self._errors, capture=capture)


class _Context:
    """An execution context with the device buffers that it reads and writes."""

    def __init__(
        self, context: Any, stream: Any, dtypes: Mapping[str, str], errors: Sequence[str], *, capture: bool
    ) -> None:
        self._context, self._stream, self._errors, self._capture = context, stream, errors, capture
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
        self._buffers: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[Tensor, int]] = {}
        self._runs = 0  # with the shapes of now
        self._graph: Any = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run; the answer is the caller's own."""
        if any(name not in self._buffers or self._buffers[name].shape != x.shape for name, x in inputs.items()):
            self._bind({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        for name, tensor in inputs.items():
            self._fill(name, tensor)
        self._stream.wait_stream(torch.cuda.current_stream())  # for the inputs
        if self._capture and self._runs == 1:  # the first run lets TensorRT allocate, which a capture forbids
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._enqueue()
        if self._graph is None:
            self._enqueue()
        else:
            with torch.cuda.stream(self._stream):
                self._graph.replay()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._runs += 1
        return self._buffers[OUTPUT].clone()  # the buffer is written again by the next call

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate buffers for inputs of these shapes and their output."""
        self._runs, self._graph = 0, None
        self._sources.clear()
        self._buffers.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise FlcompressError(f"engine: {name} {list(shape)} is outside the shapes it was built for")
            self._buffers[name] = torch.empty(shape, dtype=self._dtypes[name], device=DEVICE)
        output = tuple(self._context.get_tensor_shape(OUTPUT))
        self._buffers[OUTPUT] = torch.empty(output, dtype=self._dtypes[OUTPUT], device=DEVICE)
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())

    def _fill(self, name: str, tensor: Tensor) -> None:
        """Copy an input to its buffer, unless it is the very tensor that is there."""
        if tensor.is_inference():  # has no version, so a change of its content cannot be seen
            self._buffers[name].copy_(tensor, non_blocking=True)
            return
        source = self._sources.get(name)
        if source is None or source[0] is not tensor or source[1] != tensor._version:
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
            self._sources[name] = tensor, tensor._version

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise FlcompressError(f"engine: it did not run: {self._errors[-1] if self._errors else 'no reason given'}")


class _Cache:
    """Kernels that TensorRT for RTX compiles at the first runs, in a file beside the engine for the next process."""

    def __init__(self, engine: Any, file: Path) -> None:
        self.kernels = engine.create_runtime_config().create_runtime_cache()
        before = file.read_bytes() if file.is_file() else b""
        # A cache of another GPU, driver or version is not taken, and is replaced.
        taken = bool(before) and self.kernels.deserialize(before)
        weakref.finalize(self, _save, engine, self.kernels, file, before if taken else b"")


def _save(engine: Any, kernels: Any, file: Path, before: bytes) -> None:
    """Write a cache that has grown; where the folder cannot be written, the next process compiles anew.

    The engine is an argument because the cache is read while it lives.
    """
    content = bytes(kernels.serialize() or b"")
    if content and content != before:
        try:
            with replacing(file) as temporary:
                temporary.write_bytes(content)
        except OSError:
            return


def require_bindings(engine: Any, manifest: Mapping[str, Any], file: Path) -> None:
    """Raise RequestError unless an engine has the tensors, types and profiles that its manifest states."""
    stated = {spec["name"]: DTYPES[spec["dtype"]] for spec in (*manifest["inputs"], *manifest["outputs"])}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    own = {name: engine.get_tensor_dtype(name).name for name in names}
    if own != stated:
        name = min(name for name in {*own, *stated} if own.get(name) != stated.get(name))
        difference = f"{name} is {stated.get(name, 'no tensor')} there and {own.get(name, 'no tensor')} in the engine"
    elif engine.num_optimization_profiles != len(manifest["shapes"]):
        difference = f"{len(manifest['shapes'])} profiles there and {engine.num_optimization_profiles} in the engine"
    else:
        difference = _profile_difference(engine, manifest)
    if difference:
        raise RequestError(f"{file}: its manifest.json is that of another engine: {difference}; export it again")


def _profile_difference(engine: Any, manifest: Mapping[str, Any]) -> str:
    for index, shapes in enumerate(manifest["shapes"]):
        for name in (spec["name"] for spec in manifest["inputs"]):
            stated = [shapes[point][name] for point in ("min", "opt", "max")]
            own = [list(shape) for shape in engine.get_tensor_profile_shape(name, index)]
            if own != stated:
                return f"profile {index} takes {name} {stated} there and {own} in the engine"
    return ""


def _set_weight_budget(engine: Any) -> None:
    """Keep all weights on the GPU where they fit beside the activations, else as many as TensorRT proposes."""
    weights = engine.streamable_weights_size
    if not weights:
        return  # built without tensorrt.stream_weights
    free, _ = torch.cuda.mem_get_info()
    fits = weights + engine.device_memory_size_v2 < free
    engine.weight_streaming_budget_v2 = weights if fits else engine.get_weight_streaming_automatic_budget()


def profile_for(
    profiles: Sequence[Mapping[str, Shapes]], shapes: Mapping[str, tuple[int, ...]], exporter: str = "tensorrt"
) -> int:
    """Return the index of the first profile that holds inputs of these shapes.

    Args:
        profiles: for each profile, every input's shape under "min" and "max".
        shapes: the inputs'.
        exporter: its name in a recipe, for the message.

    Raises:
        FlcompressError: none does; names the nearest one.
    """
    outside = [_outside(profile, shapes) for profile in profiles]
    for index, distance in enumerate(outside):
        if distance == 0.0:
            return index
    index = min(range(len(profiles)), key=outside.__getitem__)
    sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    least, most = profiles[index]["min"], profiles[index]["max"]
    nearest = ", ".join(f"{name} {least[name]} to {most[name]}" for name in shapes if name in least)
    raise FlcompressError(
        f"engine: {sizes} given, which none of its {len(profiles)} profiles holds (the nearest, profiles[{index}], "
        f"takes {nearest}); generate at a size of {exporter}.profiles, or export it with another one"
    )


def _outside(profile: Mapping[str, Shapes], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return how far shapes are outside a profile: the sum over all axes of the logarithm of the factor."""
    distance = 0.0
    for name, shape in shapes.items():
        least, most = profile["min"][name], profile["max"][name]
        if len(shape) != len(least):
            return math.inf
        for low, length, high in zip(least, shape, most, strict=True):
            distance += abs(math.log(max(length, 1) / min(max(length, low), high)))
    return distance
