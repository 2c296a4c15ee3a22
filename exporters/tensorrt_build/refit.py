"""Replace the weights of a built engine by those of another model with the same graph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flcompress.errors import FlcompressError
from flcompress.runtime.tensorrt_api import log_into
from flcompress.runtime.tensorrt_session import deserialize


def graph_digest(model: Path) -> str:
    """Return the SHA-256 of an ONNX graph without the values of its weights, its floating-point initializers.

    Integers (shapes, axes) are part of what is built, weights are not; so two students of one architecture have the
    same digest, whatever trained them and whatever LoRA is merged into them.
    """
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    digest = hashlib.sha256()
    for tensor in loaded.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            for field in ("raw_data", "float_data", "int32_data", "external_data", "data_location"):
                tensor.ClearField(field)
    digest.update(loaded.SerializeToString(deterministic=True))
    return digest.hexdigest()


def refit_engine(trt: Any, engine: Path, model: Path) -> Any:
    """Return an engine, as a buffer, with the weights of an ONNX model instead of its own; needs a GPU that runs it.

    Args:
        trt: the module that built the engine.
        engine: an engine built with `refit`.
        model: an ONNX model of the same `graph_digest`; its external data is next to it.

    Raises:
        FlcompressError: TensorRT cannot load the engine, or does not accept a weight; names it.
    """
    errors: list[str] = []
    logger = log_into(trt, errors)
    loaded = deserialize(trt, trt.Runtime(logger), engine, errors)
    refitter = trt.Refitter(loaded, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not (parser.refit_from_file(str(model)) and refitter.refit_cuda_engine()):
        missing = refitter.get_missing_weights()
        reason = f"weight {missing[0]!r} is missing" if missing else (errors or ["no reason given"])[-1]
        raise FlcompressError(
            f"{engine}: TensorRT {trt.__version__} did not replace its weights by those of {model}: {reason}; remove "
            "the folder, then export again, which builds an engine"
        )
    settings = loaded.create_serialization_config()
    settings.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that the next export can do the same
    return loaded.serialize_with_config(settings)
