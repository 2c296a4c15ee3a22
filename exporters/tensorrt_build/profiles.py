"""Optimisation profiles of an engine: ranges of batch, frames and size, in the units of the clip."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flcompress.core.program import Program
from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config
from flcompress.runtime.inputs import Arguments, Shapes, tensors_of
from flcompress.runtime.sizes import Size, size_of, sizes_of, step_of


def _ascending(given: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(given) != sorted(given):
        raise ValueError(f"[{', '.join(map(str, given))}] given, expected [smallest, tuned for, largest]")
    return given


Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Count, Count, Count], AfterValidator(_ascending)]
"""[smallest, tuned for, largest]."""


class Profile(BaseModel):
    """Sizes that an engine takes; each is [smallest, tuned for, largest]; null is the recipe's own size alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = Field(default=(1, 1, 1), description="samples")
    frames: Range | None = Field(default=None, description="frames of the clip")
    height: Range | None = Field(default=None, description="pixels")
    width: Range | None = Field(default=None, description="pixels")

    def sizes(self, program: Program, dynamic: list[str]) -> list[Size]:
        """Smallest, tuned-for and largest size, in latents.

        Args:
            program: what is exported.
            dynamic: the axes that its ONNX export leaves open.

        Raises:
            RequestError: a size that the model, or this ONNX export, does not take.
        """
        own = size_of(program)
        found = []
        for place in range(3):
            frames, height, width = self._latents(program, place)
            size = Size(batch=self.batch[place], frames=frames, height=height, width=width)
            found.append(size)
        for what in ("frames", "height", "width"):
            given = [getattr(size, what) for size in found]
            if set(given) != {getattr(own, what)} and not {what, "tokens"} & set(dynamic):
                raise RequestError(
                    f"tensorrt.profiles: {what} {list(getattr(self, what) or ())} given, but a graph of "
                    f"{program.graph.model_class} has one {what}; leave {what} out"
                )
        _require_positions(program, found[-1])
        return found

    def _latents(self, program: Program, place: int) -> tuple[int, int, int]:
        own = size_of(program)
        grid = sizes_of(program)
        ranges = (self.frames, self.height, self.width)
        if all(one is None for one in ranges):
            return own.frames, own.height, own.width
        clip = grid.clip((own.frames, own.height, own.width))
        frames, height, width = (own if one is None else one[place] for one, own in zip(ranges, clip, strict=True))
        try:
            return grid.latents(frames, height, width)
        except RequestError as error:
            raise RequestError(f"tensorrt.profiles: {error}") from error

    def shapes(self, make: Arguments, sizes: list[Size]) -> list[Shapes]:
        """The inputs' shapes at the three sizes."""
        with torch.no_grad():
            return [
                {name: list(one.shape) for name, one in tensors_of(make(size, [0.0] * size.batch, 0)).items()}
                for size in sizes
            ]


def _require_positions(program: Program, largest: Size) -> None:
    """RequestError beyond the rotary table that a model was made with."""
    config: dict[str, Any] = check_transformer_config(program.components["transformer"])
    table, step = config.get("rope_max_seq_len"), step_of(program)
    for what in ("frames", "height", "width"):
        tokens = getattr(largest, what) // max(getattr(step, what), 1)
        if table is not None and tokens > table:
            raise RequestError(
                f"tensorrt.profiles: {what} of {tokens} tokens given, but rope_max_seq_len of the transformer's "
                f"config.json is {table}; choose a smaller size"
            )
