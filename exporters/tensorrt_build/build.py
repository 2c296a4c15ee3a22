"""From an ONNX file to a serialized TensorRT engine; needs no GPU where the builder is TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flcompress.errors import FlcompressError
from flcompress.runtime.inputs import Shapes
from flcompress.runtime.tensorrt_api import CURRENT, capabilities, log_into


def build_engine(
    trt: Any,
    model: Path,
    *,
    targets: Sequence[str],
    profiles: Sequence[Sequence[Shapes]],
    stream_weights: bool = False,
    refit: bool = False,
) -> Any:
    """Build a strongly typed engine: every layer computes in the type the ONNX file states, without TF32.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: the ONNX file; its external data is next to it.
        targets: compute capabilities such as "sm89", or "current".
        profiles: for each profile, every input's smallest, tuned-for and largest shape.
        stream_weights: let a part of the weights stay in host memory when it runs.
        refit: let its weights be replaced.

    Returns:
        The engine, as a buffer.

    Raises:
        UnavailableError: this TensorRT does not know a target.
        FlcompressError: the parser or the builder gave up; names the node.
    """
    errors: list[str] = []
    logger = log_into(trt, errors)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise FlcompressError(f"{model}: {_parser_error(parser)}; TensorRT {trt.__version__} cannot read this graph")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; fp32 is to mean fp32
    for shapes in profiles:
        config.add_optimization_profile(_profile(builder, network, shapes))
    flags = {trt.BuilderFlag.WEIGHT_STREAMING: stream_weights, trt.BuilderFlag.REFIT: refit}
    for flag in (flag for flag, wanted in flags.items() if wanted):
        config.set_flag(flag)
    if trt.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = len(targets)
        for index, capability in enumerate(capabilities(trt, targets)):
            config.set_compute_capability(capability, index)
    elif list(targets) != [CURRENT]:  # any card of the generation, as with TensorRT for RTX, not this model alone
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = errors[-1] if errors else "no reason given"
        raise FlcompressError(
            f"{model}: TensorRT {trt.__version__} built no engine for {', '.join(targets)}: {reason}; try "
            "smaller tensorrt.profiles or other tensorrt.targets"
        )
    return engine


def _profile(builder: Any, network: Any, shapes: Sequence[Shapes]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        profile.set_shape(name, *(sizes[name] for sizes in shapes))
    return profile


def _parser_error(parser: Any) -> str:
    if parser.num_errors == 0:
        return "the parser gave no reason"
    error = parser.get_error(0)
    return f"node '{error.node_name()}' ({error.node_operator()}): {' '.join(error.desc().split())}"
