"""The clip size that is wanted, and the bucket each video falls in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flcompress.errors import DataError
from flcompress.models.latent_size import Grid

Size = tuple[int, int, int]
"""(frames, height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class Target:
    """The size wanted; None takes a clip's own. Height and width come together."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def check(self, grid: Grid) -> None:
        """Raise RequestError for a size that the model does not take, naming the nearest that it does."""
        if (self.height is None) != (self.width is None):
            raise DataError("height and width: one of them given, expected both or neither")
        grid.check(self.frames, self.height, self.width)

    def on(self, grid: Grid) -> Target:
        """The same with the only height and width that the model takes, where there is but one."""
        if grid.fixed is None:
            return self
        return replace(self, height=grid.fixed[0], width=grid.fixed[1])

    def bucket(self, size: Size, grid: Grid) -> Size | None:
        """The size at which a video of `size` is encoded; None where it is smaller than the smallest.

        Long clips are trimmed, short ones get fewer frames. With a wanted height and width every clip is resized to
        cover it and cropped; without, it is cropped to the grid.
        """
        frames, height, width = size
        frames = grid.fit_frames(min(frames, self.frames or frames))
        if not frames:
            return None
        if self.height is not None and self.width is not None:
            return frames, self.height, self.width
        height, width = grid.fit_pixels(height), grid.fit_pixels(width)
        return (frames, height, width) if height and width else None


OWN_SIZE = Target()
"""Each clip at its own size, cropped to the grid."""
