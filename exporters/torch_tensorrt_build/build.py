"""From a part of a lowered graph to a serialized engine; needs no GPU where the builder is TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from flcompress.errors import FlcompressError
from flcompress.exporters.torch_tensorrt_build.parts import Part
from flcompress.runtime.inputs import Inputs
from flcompress.runtime.tensorrt_api import capabilities

Shapes = dict[fx.Node, list[int]]
"""Node of the whole graph -> the shape of its tensor."""


def build_engine(
    part: Part,
    names: Mapping[fx.Node, str],
    profiles: Sequence[Sequence[Shapes]],
    targets: Sequence[str],
    settings: Any,
) -> Any:
    """Build a strongly typed engine without TF32: every layer computes in the type that the graph states.

    Args:
        part: what it computes.
        names: node of the whole graph -> name of its tensor outside, for the engine's inputs and outputs.
        profiles: for each profile, the shapes at its smallest, tuned-for and largest size; all the same for an engine
            of one size.
        targets: compute capabilities such as "sm89", or "current".
        settings: Torch-TensorRT's `CompilationSettings`.

    Returns:
        The engine, as a buffer.

    Raises:
        UnavailableError: this TensorRT does not know a target.
        FlcompressError: the conversion or the builder gave up.
    """
    import tensorrt as trt  # Torch-TensorRT's own name for either TensorRT
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    interpreter = TRTInterpreter(
        part.module,
        [_input(node, profiles) for node in part.inputs],
        output_dtypes=[_dtype(node) for node in part.outputs],
        compilation_settings=settings,
        input_binding_names=[names[node] for node in part.inputs],
        output_binding_names=[names[node] for node in part.outputs],
    )
    # Its `run` would also load the engine, which takes the GPU that it is for.
    try:
        interpreter._construct_trt_network_def()
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise FlcompressError(f"torch-tensorrt: {_failed(interpreter)}: {' '.join(str(error).split())}") from error
    config = interpreter._populate_trt_builder_config()
    if trt._package_name == "tensorrt_rtx":
        config.num_compute_capabilities = len(targets)
        for index, capability in enumerate(capabilities(trt, targets, "torch-tensorrt")):
            config.set_compute_capability(capability, index)
    engine = interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
    if engine is None:
        raise FlcompressError(
            f"torch-tensorrt: TensorRT {trt.__version__} built no engine for {', '.join(targets)} of "
            f"{', '.join(part.blocks) or 'the transformer'}; its reason is in the lines above"
        )
    return engine


def shapes_of(graph: fx.GraphModule, inputs: Inputs) -> Shapes:
    """Return the shape of every tensor of a graph at the size of its inputs; nothing is computed."""
    shapes: Shapes = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n] = list(value.shape)
            return value

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        Record(graph).run(*map(mode.from_tensor, inputs.values()), enable_io_processing=False)
    return shapes


def _input(node: fx.Node, profiles: Sequence[Sequence[Shapes]]) -> Any:
    from torch_tensorrt import Input

    dtype = _dtype(node)
    points = [[tuple(shapes[node]) for shapes in profile] for profile in profiles]
    every = {shape for profile in points for shape in profile}
    if len(every) == 1:
        return Input(every.pop(), dtype=dtype)
    keys = ("min_shape", "opt_shape", "max_shape")
    return Input(profiles=[dict(zip(keys, profile, strict=True)) for profile in points], dtype=dtype)


def _dtype(node: fx.Node) -> torch.dtype:
    own: torch.dtype = node.meta["val"].dtype
    return torch.float32 if own == torch.float64 else own  # TensorRT has no fp64


def _failed(interpreter: Any) -> str:
    from flcompress.exporters.torch_tensorrt_build.lowering import module_of

    node = interpreter._cur_node
    return "the conversion failed" if node is None else f"{node.target} of '{module_of(node)}' cannot be converted"
