"""The clips that a model takes, and the sizes of their latents, by its autoencoder's factors and its patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config, read_json
from flcompress.models.families import family_of, find_family
from flcompress.models.families.family import ClipSize, Compression, Family, LatentShape

Names = tuple[str, str, str]
"""What the user calls frames, height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes that the autoencoder and the transformer's patches divide evenly.

    Attributes:
        over_time: frames that one latent frame stands for; the first frame of a clip is coded alone.
        over_space: pixels, each way, that one latent stands for.
        patch: (frames, rows or columns) of latents that one token stands for. Where it is several frames, copies of the
            first latent frame are put before it, so that they divide, and thrown away before decoding (CogVideoX 1.5).
        image: whether there is one frame only.
        fixed: (height, width) in pixels of a model whose learned positions fix them.
    """

    over_time: int
    over_space: int
    patch: tuple[int, int] = (1, 1)
    image: bool = False
    fixed: tuple[int, int] | None = None

    @property
    def pixels(self) -> int:
        """The number that height and width are multiples of."""
        return self.over_space * self.patch[1]

    @property
    def step(self) -> int:
        """Frames from one allowed number to the next."""
        return self.over_time * self.patch[0]

    @property
    def padding(self) -> int:
        """Latent frames put before the first."""
        return self.patch[0] - 1

    def fit_frames(self, frames: int) -> int:
        """Return the largest allowed number of frames up to `frames`; 0 if that is 0."""
        if self.image:
            return min(frames, 1)
        return (frames - 1) // self.step * self.step + 1 if frames else 0

    def fit_pixels(self, pixels: int) -> int:
        """Return the largest allowed height or width up to `pixels`; may be 0."""
        return pixels // self.pixels * self.pixels

    def check(
        self,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        names: Names = ("frames", "height", "width"),
    ) -> None:
        """Check a clip's size; None is not checked.

        Raises:
            RequestError: a size that the model does not take; names the nearest that it does.
        """
        if frames is not None and self.fit_frames(frames) != frames:
            below = self.fit_frames(frames)
            wanted = f"1 plus a multiple of {self.step} for this model, such as {below} or {below + self.step}"
            wanted = "1, as this model makes images" if self.image else wanted
            raise RequestError(f"{names[0]}: {frames} given, expected {wanted}")
        for axis, pixels in enumerate((height, width)):
            if pixels is None:
                continue
            if self.fixed and pixels != self.fixed[axis]:
                raise RequestError(
                    f"{names[1 + axis]}: {pixels} given, expected {self.fixed[axis]}: the positions of this model are "
                    f"learned for {self.fixed[0]} x {self.fixed[1]}"
                )
            if pixels % self.pixels:
                below = max(self.fit_pixels(pixels), self.pixels)
                raise RequestError(
                    f"{names[1 + axis]}: {pixels} given, expected a multiple of {self.pixels} for this model, such as "
                    f"{below} or {below + self.pixels}"
                )

    def latents(
        self, frames: int, height: int, width: int, names: Names = ("frames", "height", "width")
    ) -> LatentShape:
        """Return the latents' size of a clip (81 frames are 21 of latents at a factor of 4).

        Raises:
            RequestError: a size that the model does not take.
        """
        self.check(frames, height, width, names)
        coded = (frames - 1) // self.over_time + 1
        return self.padding + coded, height // self.over_space, width // self.over_space

    def clip(self, latents: LatentShape) -> tuple[int, int, int]:
        """Return (frames, height, width) of the clip that latents decode to."""
        frames, height, width = latents
        return (frames - self.padding - 1) * self.over_time + 1, height * self.over_space, width * self.over_space


def grid_of(transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid:
    """Return the sizes that a pipeline takes, from the configurations of two of its parts."""
    family = family_of(transformer["_class_name"])
    return _grid(family, transformer, family.compression(autoencoder))


def folder_grid(transformer: Path, autoencoder: Path) -> Grid:
    """Return the sizes that a pipeline takes, from the folders of two of its parts."""
    config = read_json(autoencoder / "config.json", "a pipeline's autoencoder has one")
    return grid_of(check_transformer_config(transformer), config)


def usual_grid(name: str, transformer: Mapping[str, Any]) -> tuple[Grid, ClipSize] | None:
    """Return the sizes, with the usual autoencoder, of a transformer of class `name`, and the pipeline's default one.

    For a transformer without its pipeline. None for a class of which no family knows this.
    """
    family = find_family(name)
    usual = family.usual(transformer) if family else None
    if family is None or usual is None:
        return None
    compression, size = usual
    return _grid(family, transformer, compression), size


def _grid(family: Family, transformer: Mapping[str, Any], compression: Compression) -> Grid:
    over_time, over_space = compression
    fixed = family.fixed_latents(transformer)
    return Grid(
        over_time=over_time,
        over_space=over_space,
        patch=family.patch(transformer),
        image=family.image,
        fixed=(fixed[1] * over_space, fixed[2] * over_space) if fixed else None,
    )
