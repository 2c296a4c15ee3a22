"""Sizes: what a program is sampled at, the smallest step of each axis, and the clips they decode to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flcompress.core.program import Program
from flcompress.models.configs import check_transformer_config
from flcompress.models.families import family_of
from flcompress.models.latent_size import Grid, folder_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A batch of latents: samples, frames, height and width."""

    batch: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Size of the clips that a program's autoencoder makes of its latents, in pixels and frames."""

    height: int
    width: int
    num_frames: int

    def arguments(self) -> dict[str, int]:
        """Return the size as arguments of the family's methods."""
        return asdict(self)


def size_of(program: Program, batch: int = 1) -> Size:
    """Return the size that the program is sampled at."""
    _, frames, height, width = program.latents
    return Size(batch=batch, frames=frames, height=height, width=width)


def step_of(program: Program) -> Size:
    """The smallest change of each axis that the transformer takes: a patch; no more frames than one for an image."""
    over_time, over_space = patch_of(check_transformer_config(program.components["transformer"]))
    return Size(batch=1, frames=0 if program.family.image else over_time, height=over_space, width=over_space)


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(frames, rows or columns) of latents that one token stands for."""
    return family_of(config["_class_name"]).patch(config)


def clip_of(program: Program) -> Clip:
    """Size of the clip that the program's latents decode to."""
    frames, height, width = sizes_of(program).clip(program.latents[1:])
    return Clip(height=height, width=width, num_frames=frames)


def sizes_of(program: Program) -> Grid:
    """The clips that the program takes, and their latents."""
    return folder_grid(program.components["transformer"], program.components["vae"])
