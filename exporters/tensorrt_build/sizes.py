"""The sizes of an engine's profiles: in latents, as shapes of its inputs, and those that are compared with torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.errors import RequestError
from flcompress.exporters.shared import preflight
from flcompress.exporters.shared.parity import CHECKED_UP_TO
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.models.configs import check_transformer_config
from flcompress.runtime.inputs import Arguments, Shapes, tensors_of
from flcompress.runtime.sizes import Size, size_of, sizes_of, step_of


def checked_sizes(program: Program, sizes: list[list[Size]]) -> list[Size]:
    """Return the sizes to compare at: each profile's smallest and tuned-for one, if of at most `CHECKED_UP_TO` tokens.

    Of an engine that takes longer clips alone it is the smallest size.
    """
    config = check_transformer_config(program.components["transformer"])

    def tokens(size: Size) -> int:
        return preflight.attention_tokens(config, size, 0)

    candidates = list(dict.fromkeys(size for three in sizes for size in three[:2]))
    short = [size for size in candidates if tokens(size) <= CHECKED_UP_TO]
    return short or [min(candidates, key=tokens)]


def sizes_in(profile: Profile, program: Program, dynamic: Collection[str], exporter: str) -> list[Size]:
    """Return the smallest, tuned-for and largest size of a profile, in latents.

    Args:
        profile: the ranges.
        program: what is exported.
        dynamic: the axes that its graph leaves open.
        exporter: its name in a recipe, for messages.

    Raises:
        RequestError: a size that the model, or this graph of it, does not take.
    """
    own = size_of(program)
    sizes = []
    for point in range(3):
        frames, height, width = _latents(profile, program, point, exporter)
        size = Size(batch=profile.batch[point], frames=frames, height=height, width=width)
        sizes.append(size)
    for what in ("frames", "height", "width"):
        lengths = [getattr(size, what) for size in sizes]
        if set(lengths) != {getattr(own, what)} and not {what, "tokens"} & set(dynamic):
            raise RequestError(
                f"{exporter}.profiles: {what} {list(getattr(profile, what) or ())} given, but a graph of "
                f"{program.graph.model_class} has one {what}; leave {what} out"
            )
    _require_positions(program, sizes[-1], exporter)
    return sizes


def _latents(profile: Profile, program: Program, point: int, exporter: str) -> tuple[int, int, int]:
    own = size_of(program)
    grid = sizes_of(program)
    ranges = (profile.frames, profile.height, profile.width)
    if all(span is None for span in ranges):
        return own.frames, own.height, own.width
    clip = grid.clip((own.frames, own.height, own.width))
    frames, height, width = (own if span is None else span[point] for span, own in zip(ranges, clip, strict=True))
    try:
        return grid.latents(frames, height, width)
    except RequestError as error:
        raise RequestError(f"{exporter}.profiles: {error}") from error


def shapes_at(make: Arguments, sizes: list[Size]) -> list[Shapes]:
    """Return the inputs' shapes at each size."""
    with torch.no_grad():
        return [
            {name: list(tensor.shape) for name, tensor in tensors_of(make(size, [0.0] * size.batch, 0)).items()}
            for size in sizes
        ]


def _require_positions(program: Program, largest: Size, exporter: str) -> None:
    """Raise RequestError beyond the rotary table that a model was made with."""
    config: dict[str, Any] = check_transformer_config(program.components["transformer"])
    table, step = config.get("rope_max_seq_len"), step_of(program)
    for what in ("frames", "height", "width"):
        tokens = getattr(largest, what) // max(getattr(step, what), 1)
        if table is not None and tokens > table:
            raise RequestError(
                f"{exporter}.profiles: {what} of {tokens} tokens given, but rope_max_seq_len of the transformer's "
                f"config.json is {table}; choose a smaller size"
            )
