"""Find the residual streams of a block: replay it with every parameter zero.

A residual branch then adds nothing, so an output that equals an input is that input's stream; an output of zeros is no
stream; any other output is the stream of the input with which it shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flcompress.ir.block import Stream, TensorSpec
from flcompress.tracing.call import (
    FORWARD_ERRORS,
    Blank,
    Call,
    arguments_by_name,
    fill,
    first_line,
    outputs_of,
    spec_of,
)
from flcompress.tracing.running import dense_flex_attention

# Largest input, in elements, that is replayed; above it a block of a video model would fill the memory.
LARGEST_REPLAY = 2**26


@dataclass(frozen=True, slots=True)
class Layout:
    """Streams of a block and how it returns them; `reason` explains missing or guessed streams."""

    streams: tuple[Stream, ...]
    outputs: int
    reason: str = ""
    silent: tuple[int, ...] = ()  # outputs that are zero without parameters, of the shape of a stream


def layout_of(block: nn.Module, call: Call) -> Layout:
    """Return the streams of `block`, found by replay, or by shape and position if no replay is possible."""
    outputs = outputs_of(call.output)
    count = len(outputs) if isinstance(call.output, tuple | list) else 0
    for index, output in enumerate(outputs):
        if output is not None and not isinstance(output, Blank):
            return Layout((), count, f"output {index} is {type(output).__name__}, expected a tensor")
    inputs = _blank_inputs(block, call)
    size = max((torch.Size(value.shape).numel() for value in inputs.values()), default=0)
    if size > LARGEST_REPLAY:
        why = f"an input has {size:,} elements, more than the {LARGEST_REPLAY:,} that are replayed"
        return _by_shape(inputs, outputs, count, why)
    tensor = next(block.parameters())
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    try:
        with device, dense_flex_attention():  # whatever default device the caller has set
            return _by_replay(block, call, inputs, count, device)
    except FORWARD_ERRORS as error:
        why = f"the replay failed with {type(error).__name__}: {first_line(error)}"
        return _by_shape(inputs, outputs, count, why)


def _blank_inputs(block: nn.Module, call: Call) -> dict[str, Blank]:
    """Return the recorded tensor inputs of a call, by name."""
    arguments = arguments_by_name(block, call.args, call.kwargs)
    return {name: value for name, value in arguments.items() if isinstance(value, Blank)}


def _by_replay(block: nn.Module, call: Call, inputs: Mapping[str, Blank], count: int, device: torch.device) -> Layout:
    generator = torch.Generator("cpu").manual_seed(0)
    args, kwargs = fill((call.args, dict(call.kwargs)), device, generator)
    arguments = arguments_by_name(block, args, kwargs)
    values: dict[str, Tensor] = {name: value for name, value in arguments.items() if name in inputs}
    base = outputs_of(_output_with_zero_weights(block, device, args, kwargs))
    streams: list[Stream] = []
    silent: list[tuple[int, TensorSpec]] = []
    for index, (output, recorded) in enumerate(zip(base, outputs_of(call.output), strict=True)):
        if recorded is None:
            continue
        claimed = {stream.input for stream in streams}
        free = {name: value for name, value in values.items() if name not in claimed and value.shape == output.shape}
        name = next((name for name, value in free.items() if torch.equal(output, value.to(output.dtype))), None)
        if name is None and output.any():
            follows_shift = _shift_test(block, device, args, kwargs, index)
            name = next((name for name, value in free.items() if follows_shift(value, output)), None)
            if name is None:
                return Layout((), count, f"output {index} carries no input on")
        if name is None:
            silent.append((index, spec_of(recorded)))
        else:
            streams.append(Stream(input=name, output=index, spec=spec_of(recorded)))
    reason = f"output {silent[0][0]} carries no input on" if silent else ""
    if not {spec for _, spec in silent} <= {stream.spec for stream in streams}:
        return Layout((), count, reason)
    return Layout(tuple(streams), count, reason, tuple(index for index, _ in silent))


def adopt_streams(layout: Layout, call: Call, inputs: Mapping[str, Any], sibling: Layout) -> Layout:
    """Give a block without streams those of a block of the same list, if its calls and outputs have the same form.

    A block that reads a long skip connection mixes it into its stream; without the block the stream continues.
    """
    outputs = outputs_of(call.output)
    fits = not layout.streams and sibling.streams and layout.outputs == sibling.outputs and not sibling.silent
    for stream in sibling.streams if fits else ():
        ends = inputs.get(stream.input), outputs[stream.output]
        fits = all(isinstance(end, Blank) and spec_of(end) == stream.spec for end in ends)
    return Layout(sibling.streams, layout.outputs, f"it is no plain residual: {layout.reason}") if fits else layout


def layout_by_shape(block: nn.Module, call: Call, layout: Layout) -> Layout:
    """Match the streams of a block without residual connection, such as one that starts with a norm, by shape.

    Without the block its input continues in place of an output of the same shape.
    """
    inputs = _blank_inputs(block, call)
    matched = _by_shape(inputs, outputs_of(call.output), layout.outputs, layout.reason)
    return replace(matched, reason=f"it is no plain residual: {layout.reason}") if matched.streams else matched


def _shift_test(
    block: nn.Module, device: torch.device, args: Any, kwargs: Any, index: int
) -> Callable[[Tensor, Tensor], bool]:
    """Return a test of whether shifting an input shifts output `index` by the same amount."""

    def follows_shift(value: Tensor, output: Tensor) -> bool:
        shift = torch.randn(value.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(value)
        new_args = tuple(argument + shift if argument is value else argument for argument in args)
        new_kwargs = {name: argument + shift if argument is value else argument for name, argument in kwargs.items()}
        moved: Tensor = outputs_of(_output_with_zero_weights(block, device, new_args, new_kwargs))[index]
        slack = 16 * torch.finfo(value.dtype).eps * float(output.abs().max() + shift.abs().max())
        return bool(((moved - output) - shift).abs().max() <= slack)

    return follows_shift


def _output_with_zero_weights(block: nn.Module, device: torch.device, args: Any, kwargs: Any) -> Any:
    """Return the block's output with all parameters, and meta buffers, zero."""
    zeros = {
        name: torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
        for name, value in block.named_parameters()
    }
    buffers = {
        name: torch.zeros_like(value, device=device) if value.is_meta else value
        for name, value in block.named_buffers()
    }
    with _ZeroWeights(zeros.values()):
        return torch.func.functional_call(block, zeros | buffers, args, kwargs)


class _ZeroWeights(TorchFunctionMode):
    """Short-cuts linear maps with zero weights: a block of a 14B model replays without its 1.4 GB of zeros."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self._zero = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is F.linear
            and id(args[1]) in self._zero
            and all(argument is None or id(argument) in self._zero for argument in args[2:])
        ):
            return args[0].new_zeros((*args[0].shape[:-1], args[1].shape[0]))
        return func(*args, **kwargs)


def _by_shape(inputs: Mapping[str, Blank], outputs: tuple[Any, ...], count: int, why: str) -> Layout:
    streams: list[Stream] = []
    for index, output in enumerate(outputs):
        if output is None:
            continue
        claimed = {stream.input for stream in streams}
        name = next((name for name, value in inputs.items() if name not in claimed and value == output), None)
        if name is None:
            return Layout((), count, f"output {index} has the shape of no input ({why})")
        streams.append(Stream(input=name, output=index, spec=spec_of(output)))
    return Layout(tuple(streams), count, f"streams matched by shape only: {why}")


def signature(block: nn.Module, call: Call) -> str:
    """Return a key that is equal for blocks of the same classes, settings, parameter shapes and argument shapes."""
    parts: list[object] = [call.args, sorted(call.kwargs.items()), call.output]
    for name, part in block.named_modules():
        tensors = [(key, tuple(value.shape)) for key, value in part.named_parameters(recurse=False)]
        settings = [
            (
                key,
                repr(value) if isinstance(value, bool | int | float | str | tuple | None) else type(value).__qualname__,
            )
            for key, value in sorted(vars(part).items())
            if not key.startswith("_")
        ]
        parts.append((name, type(part).__qualname__, tensors, settings))
    return repr(parts)
