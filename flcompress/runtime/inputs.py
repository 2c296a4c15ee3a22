"""A stock transformer's forward arguments at a size, as the flat, named tensors that an exported graph takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flcompress.core.program import Program
from flcompress.models.configs import check_transformer_config
from flcompress.models.families import family_of
from flcompress.models.network import stock_name
from flcompress.runtime.sizes import Size

OUTPUT = "sample"
"""What the graph's one output is called: the transformer's own prediction, fp32."""


Inputs = Mapping[str, Tensor]
"""A transformer's forward arguments that are tensors, by name; see `tensors_of`."""

Session = Callable[[Inputs], Tensor]
"""A network behind a backend: named tensors -> the transformer's prediction, fp32."""


class DeviceSession(Protocol):
    """A `Session` that says what runs it."""

    @property
    def device(self) -> str:
        """What runs it, as the runtime itself says."""

    def __call__(self, inputs: Inputs, /) -> Tensor:
        """Named tensors to the transformer's prediction, fp32."""


Shapes = dict[str, list[int]]
"""Input -> its shape."""

Arguments = Callable[[Size, Sequence[float], int], dict[str, Any]]
"""(size, timesteps [batch], seed) -> the forward's keyword arguments."""


def arguments_of(program: Program) -> Arguments:
    """Return what makes random arguments of the program's denoiser at any size, by its family as for a real call."""
    family, contract = program.family, program.contract
    config = check_transformer_config(program.components["transformer"])
    index, tokens = program.index, contract.max_sequence_length

    def make(size: Size, timesteps: Sequence[float], seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        shape = (size.frames, size.height, size.width)
        x = torch.randn(size.batch, family.channels(config), *shape, generator=draw)
        conditioning = family.call_conditioning(index, config, size.batch, shape, tokens, draw)
        arguments = family.arguments(config, x, torch.tensor(timesteps), conditioning, contract.embedded_guidance)
        return family.export_arguments(config, arguments)

    return make


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors, floating ones in fp32; a tuple of tensors becomes `<name>.0`, `<name>.1`, ..."""
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif _is_tuple_of_tensors(value):
            flat |= {f"{name}.{index}": tensor for index, tensor in enumerate(value)}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in flat.items()}


def constants_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other arguments, which become part of the exported graph."""
    return {
        name: value
        for name, value in arguments.items()
        if not isinstance(value, Tensor) and not _is_tuple_of_tensors(value)
    }


class Denoiser(nn.Module):
    """A transformer as a function of named tensors, all floating ones fp32 at its door; what the exported graph is."""

    def __init__(self, transformer: Any, constants: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Wrap.

        Args:
            transformer: a stock transformer.
            constants: forward arguments that are not tensors.
            dtype: what latents and conditioning are cast to; timestep, guidance and positions stay fp32.
        """
        super().__init__()
        self.transformer = transformer
        family = family_of(stock_name(transformer))
        family.take_export_arguments(transformer)
        self.fp32_arguments = family.fp32_arguments
        self.constants = dict(constants)
        self.dtype = dtype

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """The transformer's first output, fp32."""
        nested: dict[str, Any] = {}
        for name, tensor in tensors.items():
            argument, _, index = name.partition(".")
            cast = tensor.is_floating_point() and argument not in self.fp32_arguments
            tensor = tensor.to(self.dtype) if cast else tensor
            nested[argument] = (*nested.get(argument, ()), tensor) if index else tensor
        output: Tensor = self.transformer(**nested, **self.constants, return_dict=False)[0]
        return output.float()


def _is_tuple_of_tensors(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(item, Tensor) for item in value)
