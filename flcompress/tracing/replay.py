"""Which outputs of a block carry which inputs on: replay it with every parameter zero.

A residual branch then adds nothing, so an output that equals an input is that input's stream; all zeros is no stream;
anything else is a stream of the input by whose shift it is shifted.
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
from flcompress.tracing.call import FORWARD_ERRORS, Blank, Call, fill, first_line, named, outputs_of, spec_of
from flcompress.tracing.running import dense_flex_attention

# Largest input, in elements, that is replayed; above it a block of a video model would fill the memory.
LARGEST_REPLAY = 2**26


@dataclass(frozen=True, slots=True)
class Layout:
    """The streams of a block and how it returns them; `reason` says why there are none, or how they were guessed."""

    streams: tuple[Stream, ...]
    outputs: int
    reason: str = ""
    silent: tuple[int, ...] = ()  # outputs that are zero without parameters, of the shape of a stream


def layout_of(block: nn.Module, call: Call) -> Layout:
    """The streams of `block`, found by replay; matched by shape and position where no replay is possible."""
    outputs = outputs_of(call.output)
    count = len(outputs) if isinstance(call.output, tuple | list) else 0
    for place, output in enumerate(outputs):
        if output is not None and not isinstance(output, Blank):
            return Layout((), count, f"output {place} is {type(output).__name__}, expected a tensor")
    inputs = {name: value for name, value in named(block, call.args, call.kwargs).items() if isinstance(value, Blank)}
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


def _by_replay(block: nn.Module, call: Call, inputs: Mapping[str, Blank], count: int, device: torch.device) -> Layout:
    generator = torch.Generator("cpu").manual_seed(0)
    args, kwargs = fill((call.args, dict(call.kwargs)), device, generator)
    values: dict[str, Tensor] = {name: value for name, value in named(block, args, kwargs).items() if name in inputs}
    base = outputs_of(_zeroed(block, device, args, kwargs))
    streams: list[Stream] = []
    silent: list[tuple[int, TensorSpec]] = []
    for place, (output, recorded) in enumerate(zip(base, outputs_of(call.output), strict=True)):
        if recorded is None:
            continue
        taken = {stream.input for stream in streams}
        free = {name: value for name, value in values.items() if name not in taken and value.shape == output.shape}
        name = next((name for name, value in free.items() if torch.equal(output, value.to(output.dtype))), None)
        if name is None and output.any():
            shifted = _shifter(block, device, args, kwargs, place)
            name = next((name for name, value in free.items() if shifted(value, output)), None)
            if name is None:
                return Layout((), count, f"output {place} carries no input on")
        if name is None:
            silent.append((place, spec_of(recorded)))
        else:
            streams.append(Stream(input=name, output=place, spec=spec_of(recorded)))
    reason = f"output {silent[0][0]} carries no input on" if silent else ""
    if not {spec for _, spec in silent} <= {stream.spec for stream in streams}:
        return Layout((), count, reason)
    return Layout(tuple(streams), count, reason, tuple(place for place, _ in silent))


def adopted(layout: Layout, call: Call, inputs: Mapping[str, Any], sibling: Layout) -> Layout:
    """The streams of a block of the same list for one that carries nothing on, where it is called and answers alike.

    A block that reads a long skip connection mixes it into its stream; without the block the stream goes on.
    """
    outputs = outputs_of(call.output)
    fits = not layout.streams and sibling.streams and layout.outputs == sibling.outputs and not sibling.silent
    for stream in sibling.streams if fits else ():
        ends = inputs.get(stream.input), outputs[stream.output]
        fits = all(isinstance(end, Blank) and spec_of(end) == stream.spec for end in ends)
    return Layout(sibling.streams, layout.outputs, f"it is no plain residual: {layout.reason}") if fits else layout


def passing(block: nn.Module, call: Call, layout: Layout) -> Layout:
    """The streams of a block that is no residual at all, such as one that starts with a norm: matched by shape.

    Without the block what enters it goes on, where something of the same shape leaves it.
    """
    inputs = {name: value for name, value in named(block, call.args, call.kwargs).items() if isinstance(value, Blank)}
    found = _by_shape(inputs, outputs_of(call.output), layout.outputs, layout.reason)
    return replace(found, reason=f"it is no plain residual: {layout.reason}") if found.streams else found


def _shifter(
    block: nn.Module, device: torch.device, args: Any, kwargs: Any, place: int
) -> Callable[[Tensor, Tensor], bool]:
    """Says whether shifting one input shifts output `place` by as much."""

    def shifted(value: Tensor, output: Tensor) -> bool:
        shift = torch.randn(value.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(value)
        new_args = tuple(one + shift if one is value else one for one in args)
        new_kwargs = {name: one + shift if one is value else one for name, one in kwargs.items()}
        moved: Tensor = outputs_of(_zeroed(block, device, new_args, new_kwargs))[place]
        slack = 16 * torch.finfo(value.dtype).eps * float(output.abs().max() + shift.abs().max())
        return bool(((moved - output) - shift).abs().max() <= slack)

    return shifted


def _zeroed(block: nn.Module, device: torch.device, args: Any, kwargs: Any) -> Any:
    """What `block` returns with all parameters zero; meta buffers count as zeros too."""
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
    """Answers linear maps by a zero weight with zeros: a block of a 14B model replays without its 1.4 GB of zeros."""

    def __init__(self, weights: Any) -> None:
        super().__init__()
        self._zero = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is F.linear
            and id(args[1]) in self._zero
            and all(one is None or id(one) in self._zero for one in args[2:])
        ):
            return args[0].new_zeros((*args[0].shape[:-1], args[1].shape[0]))
        return func(*args, **kwargs)


def _by_shape(inputs: Mapping[str, Blank], outputs: tuple[Any, ...], count: int, why: str) -> Layout:
    streams: list[Stream] = []
    for place, output in enumerate(outputs):
        if output is None:
            continue
        taken = {stream.input for stream in streams}
        name = next((name for name, value in inputs.items() if name not in taken and value == output), None)
        if name is None:
            return Layout((), count, f"output {place} has the shape of no input ({why})")
        streams.append(Stream(input=name, output=place, spec=spec_of(output)))
    return Layout(tuple(streams), count, f"streams matched by shape only: {why}")


def signature(block: nn.Module, call: Call) -> str:
    """Equal for blocks that must replay alike: same classes, settings, parameter shapes and argument shapes."""
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
