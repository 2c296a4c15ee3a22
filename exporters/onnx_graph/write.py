"""Write a stock transformer's forward as an ONNX file, weights streamed from its safetensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import FlcompressError
from flcompress.exporters.onnx_graph.attention import ATTENTION_OPSET, fit_masks
from flcompress.exporters.onnx_graph.rewrites import rewrite
from flcompress.exporters.shared import Attention, ExportPrecision
from flcompress.exporters.shared.weights import DTYPES, WeightFiles, lazily_allocated, skeleton
from flcompress.models.families import family_of
from flcompress.models.network import stock_name
from flcompress.runtime.inputs import OUTPUT, Arguments, Denoiser, constants_of, tensors_of
from flcompress.runtime.sizes import Size

OPSETS: dict[ExportPrecision, int] = {"fp32": 18, "fp16": 18, "bf16": 22}
"""From 23 on attention is one operator, which TensorRT for RTX 1.7 builds for some head sizes only (not for 16); below
that torch's exporter writes it, and the RMS norm, as plain arithmetic, which every runtime knows. A convolution takes
bf16 from 22 on."""

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights above which they go to a file of their own: a protobuf file ends at 2 GiB."""

FOLDED_UP_TO = 8192
"""Numbers in a weight below which arithmetic on it alone is done ahead; larger ones are never read before they are
written."""

NOISY_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "onnxscript.optimizer._constant_folding",
    "onnxscript.version_converter",
)
"""They warn that torchvision is absent and that a Split was not folded; neither matters here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The axes of the graph's inputs that vary, by name: "batch", "frames", "height", "width", or "tokens" of several.

    Attributes:
        inputs: input -> one entry an axis, a name or a fixed number.
        output: the same for the one output.
        opset: the version of ONNX's operators in the file.
    """

    inputs: Mapping[str, list[int | str]]
    output: list[int | str]
    opset: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names that occur."""
        return tuple(dict.fromkeys(axis for axes in self.inputs.values() for axis in axes if isinstance(axis, str)))


def write_onnx(
    folder: Path,
    arguments: Arguments,
    size: Size,
    step: Size,
    precision: ExportPrecision,
    path: Path,
    attention: Attention = "plain",
) -> Axes:
    """Write the graph; weights above `EXTERNAL_ABOVE` bytes go to `<path>.data`.

    Args:
        folder: the transformer's.
        arguments: its arguments at any size.
        size: the size to trace at. An axis of 1 stays fixed: torch.export takes it for a constant.
        step: the smallest change of every axis that the model takes; 0 for one that it does not change.
        precision: precision of the weights and the arithmetic.
        path: the file.
        attention: its form in the graph.

    Returns:
        The axes that vary, and the opset.

    Raises:
        ModelError: complex numbers in the forward.
        FlcompressError: an operator without a translation.
    """
    import onnx

    inputs = arguments(size, _levels(size), 0)
    tensors, constants = tensors_of(inputs), constants_of(inputs)
    varying = varying_axes(arguments, size, step)
    denoiser = Denoiser(lazily_allocated(skeleton(folder, precision)), constants, DTYPES[precision])
    family_of(stock_name(denoiser.transformer)).prepare_export(denoiser.transformer)
    with quiet(), torch.no_grad():
        auto = torch.export.Dim.AUTO
        dynamic = {name: dict.fromkeys(axes, auto) for name, axes in varying.items()}
        exported = torch.export.export(denoiser.eval(), (tensors,), dynamic_shapes=(dynamic,), strict=False)
        opset = ATTENTION_OPSET if attention == "fused" else OPSETS[precision]
        translated = _translate(rewrite(exported), opset)
        model = translated.model
        files = WeightFiles(folder)
        _stream(model, files)
        _fold(model, files)
        if attention == "fused":
            fit_masks(model)
    axes = _name_axes(model, list(tensors), varying)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with this machine's paths
    weights = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())
    translated.save(str(path), external_data=weights > EXTERNAL_ABOVE)
    onnx.checker.check_model(str(path))  # by path: the only form that works above 2 GiB
    return axes


def _levels(size: Size) -> list[float]:
    return [500.0] * size.batch


def varying_axes(arguments: Arguments, size: Size, step: Size) -> dict[str, dict[int, str]]:
    """Return {input: {axis that follows the size: name of what it follows}}, by changing one thing at a time.

    A size that reaches the forward as a number is fixed in the graph, and so varies nothing.
    """
    base = arguments(size, _levels(size), 0)
    axes: dict[str, dict[int, str]] = {name: {} for name in tensors_of(base)}
    space = [what for what in ("frames", "height", "width") if getattr(step, what)]
    free = all(constants_of(_at(arguments, size, step, what)) == constants_of(base) for what in space)
    for what in ("batch", *(space if free else ())):
        other = tensors_of(_at(arguments, size, step, what))
        for name, tensor in tensors_of(base).items():
            for axis, (before, after) in enumerate(zip(tensor.shape, other[name].shape, strict=True)):
                if before != after:
                    axes[name][axis] = "tokens" if axis in axes[name] else what
    return axes


def _at(arguments: Arguments, size: Size, step: Size, what: str) -> dict[str, Any]:
    changed = replace(size, **{what: getattr(size, what) + getattr(step, what)})
    return arguments(changed, _levels(changed), 0)


def _translate(program: torch.export.ExportedProgram, opset: int) -> Any:
    from torch.onnx._internal.exporter._errors import ConversionError  # torch has no public name for it

    try:
        result = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    except ConversionError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = " ".join(str(cause).split())
        raise FlcompressError(
            f"onnx: torch {torch.__version__} cannot write this forward at opset {opset}: {line}; "
            "write the operator in plain arithmetic, or leave 'onnx' out of exports:"
        ) from error
    if result is None:
        raise RuntimeError("torch.onnx.export returned nothing; with dynamo=True it is documented to return a program")
    return result


def _stream(model: Any, files: WeightFiles) -> None:
    """Let every initializer that is a weight be read from its file when the model is saved."""
    for name, value in model.graph.initializers.items():
        if _key(name) in files:
            value.const_value = _lazy(files, name, value.const_value)


def _key(initializer: str) -> str:
    return initializer.removeprefix("transformer.")


def _lazy(files: WeightFiles, name: str, like: Any, *, transposed: bool = False) -> Any:
    import onnx_ir
    from torch.onnx._internal.exporter._core import TorchTensor  # the one tensor of onnx_ir's that knows bf16 of torch

    dtype = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[like.dtype.name]
    shape = tuple(int(n) for n in like.shape)

    def read() -> Any:
        tensor = files[_key(name)].to(dtype)
        return TorchTensor(tensor.T.contiguous() if transposed else tensor.contiguous(), name=name)

    return onnx_ir.LazyTensor(
        read, dtype=like.dtype, shape=onnx_ir.Shape(shape[::-1] if transposed else shape), name=like.name
    )


def _fold(model: Any, files: WeightFiles) -> None:
    """Compute ahead what depends on no input.

    Of torch's optimiser this uses only what TensorRT needs: its rewrite rules took three times as long as all the rest,
    and both runtimes fuse by themselves.
    """
    import onnx_ir
    from onnxscript import optimizer

    def small(node: Any) -> bool | None:
        values = [value.const_value for value in node.inputs if value is not None]
        large = any(isinstance(value, onnx_ir.LazyTensor) and value.size > FOLDED_UP_TO for value in values)
        return False if large else None

    optimizer.fold_constants(model, should_fold=small)
    optimizer.remove_unused_nodes(model)
    for node in list(model.graph):  # a linear layer's weight is written transposed, so that no runtime has to do it
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or not isinstance(value.const_value, onnx_ir.LazyTensor) or len(value.const_value.shape) != 2:
            continue
        turned = onnx_ir.Value(name=f"{value.name}.T", shape=node.outputs[0].shape, type=node.outputs[0].type)
        turned.const_value = _lazy(files, value.name, value.const_value, transposed=True)
        model.graph.register_initializer(turned)
        node.outputs[0].replace_all_uses_with(turned)
    optimizer.remove_unused_nodes(model)


def _name_axes(model: Any, names: list[str], varying: dict[str, dict[int, str]]) -> Axes:
    """Name inputs, output and varying axes; an axis that torch.export found to be fixed keeps its number."""
    import onnx_ir

    inputs: dict[str, list[int | str]] = {}
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
        inputs[name] = [
            axis if isinstance(axis, int) else varying[name][position] for position, axis in enumerate(value.shape)
        ]
        value.shape = onnx_ir.Shape(inputs[name])
    (result,) = model.graph.outputs
    result.name = OUTPUT
    # Every stock transformer's output has the axes of its first input.
    output = [
        axis if isinstance(axis, int) else inputs["hidden_states"][position]
        for position, axis in enumerate(result.shape)
    ]
    result.shape = onnx_ir.Shape(output)
    return Axes(inputs=inputs, output=output, opset=model.graph.opset_imports[""])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the known notices of torch's exporter, and nothing else."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch copies its own deprecated LeafSpec while it exports; nothing a caller could change.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
