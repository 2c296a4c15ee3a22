"""From an ONNX file to a serialized TensorRT engine; needs no GPU where the builder is TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flcompress.errors import FlcompressError, UnavailableError
from flcompress.exporters.tensorrt_api import builds_for_others, log_into


def build_engine(trt: Any, model: Path, *, targets: Sequence[str], max_batch: int) -> bytes:
    """Build a strongly typed engine: every layer computes in the type the ONNX file states, TF32 left out.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: the ONNX file; its first axis is the batch, wherever it is dynamic.
        targets: compute capabilities such as "sm89", or "current".
        max_batch: largest batch; the engine is tuned for a batch of one.

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
    config.add_optimization_profile(_profile(builder, network, max_batch))
    if builds_for_others(trt):
        _set_targets(trt, config, targets)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = errors[-1] if errors else "no reason given"
        raise FlcompressError(
            f"{model}: TensorRT {trt.__version__} built no engine for {', '.join(targets)} at a batch of up to "
            f"{max_batch}: {reason}; try a smaller tensorrt.max_batch or other tensorrt.targets"
        )
    return bytes(engine)


def _profile(builder: Any, network: Any, max_batch: int) -> Any:
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        tensor = network.get_input(place)
        rest = list(tensor.shape)[1:]
        profile.set_shape(tensor.name, [1, *rest], [1, *rest], [max_batch, *rest])
    return profile


def _set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    config.num_compute_capabilities = len(targets)
    for place, target in enumerate(targets):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None or not config.set_compute_capability(capability, place):
            known = ", ".join(name.lower() for name in trt.ComputeCapability.__members__ if name != "NONE")
            raise UnavailableError(f"tensorrt.targets: {target} given, TensorRT {trt.__version__} knows {known}")


def _parser_error(parser: Any) -> str:
    if parser.num_errors == 0:
        return "the parser gave no reason"
    error = parser.get_error(0)
    return f"node '{error.node_name()}' ({error.node_operator()}): {' '.join(error.desc().split())}"
