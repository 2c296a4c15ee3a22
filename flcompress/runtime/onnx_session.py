"""An exported ONNX denoiser, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.runtime.inputs import OUTPUT, Inputs
from flcompress.runtime.onnx_providers import EXTRAS, PROVIDERS, Provider, provider_options, rtx_devices

Optimization = Literal["all", "basic", "off"]

RESIDENT = 2
"""Copies on the device kept for each input: a guided step runs the prompt's and the negative prompt's in turn."""

HEAVY = frozenset({"MatMul", "Gemm", "FusedMatMul", "Conv", "Attention", "MultiHeadAttention", "Softmax"})
"""Operators that are never arithmetic on shapes, whatever an optimiser has named them."""


class OnnxSession:
    """An ONNX model in memory; callable as a `flcompress.runtime.inputs.Session`.

    Inputs and output are bound by address to the memory of torch's tensors on the session's own device. An input that
    is there already is read where it is; one that comes from elsewhere is copied once, not at each of the steps that
    it stays the same.

    Attributes:
        session: ONNX Runtime's.
        device: the execution provider that runs it.
    """

    def __init__(
        self,
        model: Path,
        provider: Provider = "cpu",
        *,
        lean: bool = False,
        precision: str = "fp32",
        optimization: Optimization = "all",
        cache: Path | None = None,
    ) -> None:
        """Load `model` (its external data next to it).

        Args:
            model: the file.
            provider: what runs it.
            lean: hold no second copy of the weights: slower, for a check of a large model.
            precision: the export's.
            optimization: what ONNX Runtime rewrites in the graph.
            cache: folder for what a provider builds from the graph.

        Raises:
            UnavailableError: ONNX Runtime did not take the provider (it falls back to the CPU silently), leaves
                arithmetic to the CPU, or lacks kernels for the graph there, as for bf16 on a CPU.
        """
        import onnxruntime

        self._model, self._provider = model, provider
        level = onnxruntime.GraphOptimizationLevel
        levels = {"all": level.ORT_ENABLE_ALL, "basic": level.ORT_ENABLE_BASIC, "off": level.ORT_DISABLE_ALL}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = levels[optimization]
        options.intra_op_num_threads = torch.get_num_threads()  # as torch has, so that the two compare fairly
        options.log_severity_level = 4  # its errors are raised too; what else it says is about its own optimiser
        if lean:  # else fp16 weights become fp32 ones ahead of the run, all at once, and stay
            options.graph_optimization_level = level.ORT_DISABLE_ALL
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.session = self._load(options, provider_options(provider, precision, cache))
        self.device = str(self.session.get_providers()[0])
        if self.device != PROVIDERS[provider]:
            raise UnavailableError(
                f"{model}: ONNX Runtime runs it on {self.device}, {PROVIDERS[provider]} was asked for; pip uninstall "
                f"onnxruntime onnxruntime-gpu, then pip install 'flcompress[{EXTRAS[provider]}]', and check the CUDA "
                "libraries"
            )
        if provider != "cpu":
            self._require_placement()
        self._memory = "cpu" if provider == "cpu" else "cuda"
        self._axes: dict[str, list[Any]] = {spec.name: list(spec.shape) for spec in self.session.get_inputs()}
        self._output_shapes: dict[tuple[tuple[int, ...], ...], torch.Size] = {}  # by those of the inputs
        self._binding = self.session.io_binding()
        self._bound: dict[str, Tensor] = {}
        self._resident: dict[str, list[tuple[Tensor, int, Tensor]]] = {name: [] for name in self._axes}
        self._output: Tensor | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Run the graph: named inputs to the predicted `sample`, on the session's own device."""
        shapes = {name: tuple(inputs[name].shape) for name in self._axes}  # what the forward never reads is no input
        self._require_shapes(shapes)
        for name in self._axes:
            self._bind(name, self._on_device(name, inputs[name].detach()))
        key = tuple(shapes.values())
        output = self._bind_output(self._output_shapes.get(key))
        if self._memory == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
        try:
            self.session.run_with_iobinding(self._binding)
        except RuntimeError as error:
            line = " ".join(str(error).split())
            raise FlcompressError(f"{self._model}: ONNX Runtime did not run it on {self.device}: {line}") from error
        if output is not None:
            return output.clone()  # the next call overwrites it
        first = torch.from_numpy(self._binding.copy_outputs_to_cpu()[0]).clone().to(self._memory)
        self._output_shapes[key] = first.shape
        return first

    def _load(self, options: Any, own: Mapping[str, str]) -> Any:
        import onnxruntime

        state, wanted = onnxruntime.capi.onnxruntime_pybind11_state, PROVIDERS[self._provider]
        try:
            keywords = self._add_provider(options, own)
            return onnxruntime.InferenceSession(str(self._model), options, enable_fallback=0, **keywords)
        except state.NotImplemented as error:
            raise UnavailableError(
                f"{self._model}: ONNX Runtime has no kernels for it on {wanted} ({' '.join(str(error).split())}); run "
                "it on an NVIDIA GPU with 'flcompress[onnxruntime-gpu]', or export it with onnx.precision: fp32"
            ) from error
        except (RuntimeError, state.Fail) as error:  # a library of the provider's that is not there, above all
            raise UnavailableError(
                f"{self._model}: ONNX Runtime cannot load it for {wanted}: {' '.join(str(error).split())}"
            ) from error

    def _add_provider(self, options: Any, own: Mapping[str, str]) -> dict[str, Any]:
        """Put the provider into the session's options, or return it as the session's keyword arguments."""
        import onnxruntime

        if self._provider != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if self._provider == "nv-tensorrt-rtx":
            if not (devices := rtx_devices()):
                raise UnavailableError(
                    f"{self._model}: {PROVIDERS[self._provider]} takes none of the GPUs here, only RTX cards of the "
                    "generation Ampere or a later one; take --provider cuda or tensorrt"
                )
            options.add_provider_for_devices(devices, dict(own))
            return {}
        order: list[tuple[str, dict[str, str]]] = [(PROVIDERS[self._provider], dict(own))]
        if self._provider == "tensorrt":  # what it cannot build, CUDA runs
            order.append((PROVIDERS["cuda"], provider_options("cuda", "", None)))
        if self._provider != "cpu":
            order.append((PROVIDERS["cpu"], {}))
        # A provider this build lacks is left out of the list, because ONNX Runtime would only warn about it.
        available = onnxruntime.get_available_providers()
        return {"providers": [entry for entry in order if entry[0] in available]}

    def _require_placement(self) -> None:
        """Raise UnavailableError where a node that computes on the clip's tokens is left to the CPU."""
        if not hasattr(self.session, "get_provider_graph_assignment_info"):
            raise UnavailableError(
                f"{self._model}: this ONNX Runtime does not say what it leaves to the CPU; pip install -U "
                f"'flcompress[{EXTRAS[self._provider]}]', or take --provider cpu"
            )
        assignment = [
            (part.ep_name, node.name, node.op_type)
            for part in self.session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        left = left_to_cpu(assignment, token_nodes(self._model))
        if left:
            raise UnavailableError(
                f"{self._model}: ONNX Runtime leaves {len(left)} nodes on the clip's tokens to the CPU, not to "
                f"{self.device}, such as {left[0]}: their data would be copied there and back at every step; "
                f"pip install -U 'flcompress[{EXTRAS[self._provider]}]', or take --provider cpu"
            )

    def _require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise RequestError for shapes that the graph does not take."""
        lengths: dict[str, int] = {}
        for name, axes in self._axes.items():
            shape = shapes[name]
            fits = len(axes) == len(shape) and all(
                axis == length if isinstance(axis, int) else lengths.setdefault(axis, length) == length
                for axis, length in zip(axes, shape, strict=True)
            )
            if not fits:
                varying = dict(zip(axes, shape, strict=False)) | lengths
                nearest = [axis if isinstance(axis, int) else varying.get(axis, axis) for axis in axes]
                raise RequestError(
                    f"{self._model}: {name} {list(shape)} given, but the graph takes {axes}, the nearest of which is "
                    f"{nearest}; choose the size that it was exported at"
                )

    def _on_device(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor in memory that can be bound: itself, or a copy that is kept as long as it is reused."""
        if tensor.device.type == self._memory and tensor.is_contiguous():
            return tensor
        kept, version = self._resident[name], _version(tensor)
        for entry in kept:
            source, its_version, copy = entry
            if version is not None and version == its_version and _same_memory(source, tensor):
                kept.remove(entry)
                kept.append(entry)
                return copy
        copy = tensor.to(self._memory).contiguous()
        if version is not None:
            kept.append((tensor, version, copy))
            del kept[:-RESIDENT]
        return copy

    def _bind(self, name: str, tensor: Tensor) -> None:
        bound = self._bound.get(name)
        if bound is None or not _same_memory(bound, tensor):
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._binding.bind_input(name, self._memory, 0, _numpy(dtype), list(tensor.shape), tensor.data_ptr())
        self._bound[name] = tensor  # held, so that its address stays its own

    def _bind_output(self, shape: torch.Size | None) -> Tensor | None:
        """Bind the output's buffer; None for a shape that the first call with these inputs has yet to tell."""
        if shape is None:
            self._output = None
            self._binding.bind_output(OUTPUT)
        elif self._output is None or self._output.shape != shape:
            self._output = torch.empty(shape, device=self._memory)
            address = self._output.data_ptr()
            self._binding.bind_output(OUTPUT, self._memory, 0, _numpy("float32"), list(shape), address)
        return self._output


def token_nodes(model: Path) -> set[str]:
    """Names of the nodes of a model whose result is floating and of three axes or more: data of the clip's tokens.

    Arithmetic on shapes is in integers, which providers leave to the CPU on purpose, and what is computed of the
    timestep alone has two axes.
    """
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    data = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type in floating and len(value.type.tensor_type.shape.dim) > 2
    }
    return {node.name for node in graph.node if data.intersection(node.output)}


def left_to_cpu(assignment: Iterable[tuple[str, str, str]], tokens: set[str]) -> list[str]:
    """Return the nodes on the CPU that are no arithmetic on shapes, as "operator name".

    Args:
        assignment: (provider, node, operator) of every node.
        tokens: names from `token_nodes`.
    """
    return [
        f"{operator} {name}".rstrip()
        for provider, name, operator in assignment
        if provider == PROVIDERS["cpu"] and (name in tokens or operator in HEAVY)
    ]


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count, so that it is taken for new each time."""
    return None if tensor.is_inference() else tensor._version


def _numpy(dtype: str) -> Any:
    import numpy

    return numpy.dtype(dtype).type
