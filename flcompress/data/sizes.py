"""Clip sizes that a model takes, and the bucket each video falls in."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.errors import DataError

Size = tuple[int, int, int]
"""(frames, height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes that the autoencoder and the transformer's patches divide evenly.

    Attributes:
        frames: frames are 1 + k times this; 0 for images, which have one.
        pixels: height and width are multiples of this.
    """

    frames: int
    pixels: int

    def fit_frames(self, frames: int) -> int:
        """The largest allowed number of frames up to `frames`, which is at least 1."""
        return (frames - 1) // self.frames * self.frames + 1 if self.frames else 1

    def fit_pixels(self, pixels: int) -> int:
        """The largest allowed height or width up to `pixels`; may be 0."""
        return pixels // self.pixels * self.pixels


@dataclass(frozen=True, slots=True)
class Target:
    """The size wanted; None takes a clip's own. Height and width come together."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def check(self, grid: Grid) -> None:
        """Raise DataError for a size that the model does not take, naming the nearest that it does."""
        if (self.height is None) != (self.width is None):
            raise DataError("height and width: one of them given, expected both or neither")
        for name, given in (("height", self.height), ("width", self.width)):
            if given is not None and given % grid.pixels:
                below = max(grid.fit_pixels(given), grid.pixels)
                raise DataError(
                    f"{name}: {given} given, expected a multiple of {grid.pixels} for this model, "
                    f"such as {below} or {below + grid.pixels}"
                )
        if self.frames is not None and grid.fit_frames(self.frames) != self.frames:
            below = grid.fit_frames(self.frames)
            wanted = f"1 + a multiple of {grid.frames}" if grid.frames else "1, as this model makes images"
            raise DataError(
                f"frames: {self.frames} given, expected {wanted}"
                + (f" for this model, such as {below} or {below + grid.frames}" if grid.frames else "")
            )

    def bucket(self, size: Size, grid: Grid) -> Size | None:
        """The size at which a video of `size` is encoded; None where it is smaller than the smallest.

        Long clips are trimmed, short ones get fewer frames. With a wanted height and width every clip is resized to
        cover it and cropped; without, it is cropped to the grid.
        """
        frames, height, width = size
        if frames < 1:
            return None
        frames = grid.fit_frames(min(frames, self.frames or frames))
        if self.height is not None and self.width is not None:
            return frames, self.height, self.width
        height, width = grid.fit_pixels(height), grid.fit_pixels(width)
        return (frames, height, width) if height and width else None


OWN_SIZE = Target()
"""Each clip at its own size, cropped to the grid."""
