"""A stock transformer's forward arguments at a size, as the flat, named tensors that an exported graph takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flcompress.core.program import Program
from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.configs import check_transformer_config
from flcompress.models.inputs import FP32_ARGUMENTS
from flcompress.runtime.positions import take_tables, with_positions
from flcompress.runtime.sizes import Size

OUTPUT = "sample"
"""What the graph's one output is called: the transformer's own prediction, fp32."""


Inputs = Mapping[str, Tensor]
"""A transformer's forward arguments that are tensors, by name; see `tensors_of`."""

Session = Callable[[Inputs], Tensor]
"""A network behind a backend: named tensors -> the transformer's prediction, fp32."""

Shapes = dict[str, list[int]]
"""Input -> its shape."""

Arguments = Callable[[Size, Sequence[float], int], dict[str, Any]]
"""(size, timesteps [batch], seed) -> the forward's keyword arguments."""


def arguments_of(program: Program) -> Arguments:
    """Random arguments of the program's denoiser at any size, made by its family as for a real call."""
    family, contract = program.family, program.contract
    config = check_transformer_config(program.components["transformer"])
    per_token = program.pipeline_class in family.from_image and bool(program.index.get("expand_timesteps"))

    def make(size: Size, timesteps: Sequence[float], seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        shape = (size.frames, size.height, size.width)
        x = torch.randn(size.batch, family.channels(config), *shape, generator=draw)
        given: Conditioning = family.example_conditioning(config, size.batch, shape, contract.max_sequence_length, draw)
        if per_token:  # Wan 2.2: the first latent frame is given, and its tokens stand at timestep 0
            given = {**given, "first_frame": torch.randn(*x.shape[:2], 1, *shape[1:], generator=draw)}
        made = family.arguments(config, x, torch.tensor(timesteps), given, contract.embedded_guidance)
        return with_positions(config, made)

    return make


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among them, floating ones in fp32; a tuple of tensors becomes `<name>.0`, `<name>.1`, ..."""
    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif _is_tuple_of_tensors(value):
            flat |= {f"{name}.{place}": one for place, one in enumerate(value)}
    return {name: one.float() if one.is_floating_point() else one for name, one in flat.items()}


def constants_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The others: they become part of the exported graph."""
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
            dtype: what latents and conditioning are cast to; timestep, guidance and positions stay fp32, because a
                timestep of 6000 would become 6016 in bf16.
        """
        super().__init__()
        self.transformer = transformer
        self.tables = take_tables(transformer)
        self.constants = dict(constants)
        self.dtype = dtype

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """The transformer's first output, fp32."""
        nested: dict[str, Any] = {}
        for name, tensor in tensors.items():
            argument, _, place = name.partition(".")
            cast = tensor.is_floating_point() and argument not in FP32_ARGUMENTS
            tensor = tensor.to(self.dtype) if cast else tensor
            nested[argument] = (*nested.get(argument, ()), tensor) if place else tensor
        if self.tables is not None:
            self.tables.given = nested.pop("image_rotary_emb")
        made: Tensor = self.transformer(**nested, **self.constants, return_dict=False)[0].float()
        if self.tables is not None:
            self.tables.given = None
        return made


def _is_tuple_of_tensors(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(one, Tensor) for one in value)
